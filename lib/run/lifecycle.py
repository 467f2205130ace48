"""What every job goes through, whatever its kernel does: signals, heartbeat, exit codes, and who made what."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

from lib.base.advice import advised
from lib.base.errors import DONE, UserError
from lib.run.extent import Extent, extent
from lib.run.heartbeat import Heartbeat
from lib.run.parents import read_from
from lib.run.site import ROOT
from lib.run.watch import ending_with_its_starters
from lib.store import Cell
from lib.store.markers import Facts, sweep


class Terminated(BaseException):
    """SIGTERM or SIGINT: the scheduler kills soon. What is committed stays."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Notice:
    """SIGUSR1, the warning before the time limit: finish the shard or step in hand, then stop with REQUEUE."""

    def __init__(self, unit: str) -> None:
        self.unit, self.came = unit, False

    def on_usr1(self, signum: int, frame: FrameType | None) -> None:
        if not self.came:
            print(f"SIGUSR1: the time limit is near; stopping after this {self.unit}", flush=True)
        self.came = True

    @staticmethod
    def on_term(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # Slurm sends it up to three times
        raise Terminated(signum)


_heeding: list[Notice] = []


@contextlib.contextmanager
def heed_signals(unit: str) -> Iterator[Notice]:
    """From here on USR1 asks for a tidy stop and TERM for one at once. A warning that comes after the work has nothing
    left to stop and is passed over: USR1's default would end the process with another exit code. Within a task that
    heeds them its cells do too."""
    if _heeding:
        _heeding[0].unit = unit
        yield _heeding[0]
        return
    notice = Notice(unit)
    _heeding.append(notice)
    wanted = {signal.SIGUSR1: notice.on_usr1, signal.SIGTERM: notice.on_term, signal.SIGINT: notice.on_term}
    before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
    before[signal.SIGUSR1] = lambda *_: None  # not SIG_IGN, which children would inherit
    try:
        yield notice
    finally:
        _heeding.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def live(cell: Cell, gpus: int, unit: str, kept: str, work: Callable[[Heartbeat, Notice], int]) -> int:
    """Bring one cell to its end, or to the signal that stops it. Returns the exit code."""
    sweep(cell.folder / "tasks")
    beat = Heartbeat(cell.folder / "tasks", cell, gpus)
    with heed_signals(unit) as notice, ending_with_its_starters():
        try:
            beat.beat("starting")
            code = work(beat, notice)
            if code == DONE and not (now := extent(cell)).whole:
                raise UserError(
                    f"{_gone(cell, now)}, although they were committed: {cell.path} was changed meanwhile; "
                    "`make resume` does them again"
                )
            beat.beat("done" if code == DONE else "requeue")
            return code
        except Terminated as t:
            code = stopped_by(t, kept)
            with contextlib.suppress(UserError):
                beat.beat("terminated", error=str(t))
            return code
        except BaseException as e:
            with contextlib.suppress(Exception):
                beat.beat("failed", error=advised(f"{type(e).__name__}: {e}".replace("UserError: ", ""))[:500])
            raise


def stopped_by(t: Terminated, kept: str) -> int:
    """Says it; the exit code."""
    print(f"stopped by {t}: {kept} are kept; {advised('`make resume` does the rest')}", file=sys.stderr, flush=True)
    return 128 + t.signum


def _gone(cell: Cell, now: Extent) -> str:
    return f"{sum(b - a for a, b in now.left or [])} of {cell.total} are gone"


class Totals(dict[str, float]):
    """Facts of a task: numbers are summed, and said at its end."""

    def count(self, facts: Facts) -> None:
        for key, value in facts.items():
            if not isinstance(value, str):
                self[key] = self.get(key, 0) + value

    def say(self) -> None:
        if self:
            said = ", ".join(f"{key.replace('_', ' ')} {value:,.6g}" for key, value in self.items())
            print(f"in all: {said}", flush=True)


def provenance(beat: Heartbeat, cell: Cell) -> dict[str, Any]:
    """Who made a piece, and from what: kept in its marker, never in the data."""
    names = ["torch", "transformers", "numpy", "h5py"]
    made = {
        "attempt": beat.path.stem,
        "host": beat.facts["node"],
        "job": beat.facts["job"],
        "restart": beat.facts["restart"],
        "gpus": beat.facts["gpus"],
        "code": _commit(),
        "versions": {name: _version(name) for name in names},
    }
    return made | ({"rows": cell.total, "parents": read_from(cell)} if cell.parents else {})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The repository's commit, '+' when the tree has changes on top; empty outside a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return out.stdout.strip()
    return ""
