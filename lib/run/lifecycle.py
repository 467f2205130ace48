"""What every job goes through, whatever its kernel does: signals, heartbeat, exit codes, and who made what."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from lib.base.advice import advised
from lib.base.atomic import write_json
from lib.base.errors import DONE, UserError
from lib.base.process import HOST, pid_started
from lib.run.watch import ending_with_its_starters
from lib.store import Cell
from lib.store.markers import Facts


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


@contextlib.contextmanager
def heed_signals(unit: str) -> Iterator[Notice]:
    """From here on USR1 asks for a tidy stop and TERM for one at once. A warning that comes after the work has nothing
    left to stop and is passed over: USR1's default would end the process with another exit code."""
    notice = Notice(unit)
    wanted = {signal.SIGUSR1: notice.on_usr1, signal.SIGTERM: notice.on_term, signal.SIGINT: notice.on_term}
    before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
    before[signal.SIGUSR1] = lambda *_: None  # not SIG_IGN, which children would inherit
    try:
        yield notice
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class Beat:
    """What a heartbeat says, as far as anything relies on it."""

    cell: str
    digest: str
    state: str
    started: float
    updated: float = 0.0
    job: str = ""
    host: str = ""
    node: str = ""
    pid: int = 0
    pid_started: str = ""
    log: str = ""
    error: str = ""
    attempt: str = ""  # the file's name


class Heartbeat:
    """A small file on scratch that tells `make status` which attempt works on a cell, and how the last one ended."""

    def __init__(self, folder: Path, cell: Cell, gpus: int) -> None:
        env = os.environ
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")
        restart = int(env.get("SLURM_RESTART_COUNT", "0"))
        who = f"{job}.r{restart}" if job else f"{HOST}.{os.getpid()}"
        self.path = folder / f"{cell.name}-{who}.json"
        self.facts: dict[str, Any] = {
            "cell": cell.name,
            "index": cell.index,
            "digest": cell.digest,
            "job": job,
            "job_id": env.get("SLURM_JOB_ID", ""),
            "restart": restart,
            "host": HOST,
            "node": env.get("SLURMD_NODENAME", HOST),
            "pid": os.getpid(),
            "pid_started": pid_started(os.getpid()),
            "gpus": gpus,
            "started": time.time(),
            "log": env.get("SUITE_LOG", ""),
        }

    def beat(self, state: str, **more: Any) -> None:
        self.facts.update(state=state, updated=time.time(), **more)
        write_json(self.path, self.facts)


def live(cell: Cell, gpus: int, unit: str, kept: str, work: Callable[[Heartbeat, Notice], int]) -> int:
    """Bring one cell to its end, or to the signal that stops it. Returns the exit code."""
    beat = Heartbeat(cell.path.parent.parent / "tasks", cell, gpus)
    with heed_signals(unit) as notice, ending_with_its_starters():
        try:
            beat.beat("starting")
            code = work(beat, notice)
            beat.beat("done" if code == DONE else "requeue")
            return code
        except Terminated as t:
            rest = advised("`make resume` does the rest")
            print(f"stopped by {t}: {kept} are kept; {rest}", file=sys.stderr, flush=True)
            with contextlib.suppress(UserError):
                beat.beat("terminated", error=str(t))
            return 128 + t.signum
        except BaseException as e:
            with contextlib.suppress(Exception):
                beat.beat("failed", error=advised(f"{type(e).__name__}: {e}".replace("UserError: ", ""))[:500])
            raise


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


def provenance(beat: Heartbeat) -> dict[str, Any]:
    """Who made a piece: kept in its marker, never in the data."""
    names = ["torch", "transformers", "numpy", "h5py"]
    return {
        "attempt": beat.path.stem,
        "host": beat.facts["node"],
        "job": beat.facts["job"],
        "restart": beat.facts["restart"],
        "gpus": beat.facts["gpus"],
        "code": _commit(),
        "versions": {name: _version(name) for name in names},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The repository's commit, '+' when the tree has changes on top; empty outside a repository."""
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return out.stdout.strip()
    return ""
