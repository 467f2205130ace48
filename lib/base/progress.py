"""Progress of long work: a bar on a terminal, one plain line now and then in a log."""

import sys
import time

from tqdm import tqdm


def clock(seconds: float) -> str:
    """85 -> '1:25', 3700 -> '1:01:40'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """rows 3072/10000 31% 412 rows/s eta 0:17"""

    def __init__(self, total: int, done: int = 0, unit: str = "rows", every: float = 30.0) -> None:
        self.total, self.done, self.unit, self.every = total, done, unit, every
        self.first, self.started = done, time.monotonic()
        self.last = self.started
        tty = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", smoothing=0.1) if tty else None

    def add(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self.last >= self.every or self.done >= self.total:
            self.last = time.monotonic()
            self.say()

    def say(self) -> None:
        rate = (self.done - self.first) / max(self.last - self.started, 1e-9)
        eta = clock((self.total - self.done) / rate) if rate else "?"
        percent = 100 * self.done // max(self.total, 1)
        print(f"{self.unit} {self.done}/{self.total} {percent}% {rate:.3g} {self.unit}/s eta {eta}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
