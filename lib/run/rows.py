"""The one loop of every job: take the next undone shard, run the kernel, commit, heed signals, report.

It knows rows and columns, not which experiment they belong to."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from lib.base.advice import advised
from lib.base.atomic import write_json
from lib.base.errors import DONE, REQUEUE, UserError
from lib.base.process import HOST, pid_started
from lib.base.progress import Progress
from lib.run.watch import ending_with_its_starters
from lib.store.shards import Cell, Schema, commit, gaps, plan_shards, scan, set_aside, sweep


class Kernel(Protocol):
    """What a job computes. `prepare` is host work, done on a thread while the shard before is computed."""

    def prepare(self, start: int, stop: int) -> Any: ...

    def compute(self, prepared: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Columns of the shard, and facts for its marker; numbers among these are summed and said at the end."""
        ...


class Terminated(BaseException):
    """SIGTERM or SIGINT: the scheduler kills soon. What is committed stays."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Notice:
    """SIGUSR1, the warning before the time limit: finish the shard in hand, then stop with REQUEUE."""

    def __init__(self) -> None:
        self.came = False

    def on_usr1(self, signum: int, frame: FrameType | None) -> None:
        if not self.came:
            print("SIGUSR1: the time limit is near; stopping after this shard", flush=True)
        self.came = True

    @staticmethod
    def on_term(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # Slurm sends it up to three times
        raise Terminated(signum)


@contextlib.contextmanager
def heed_signals() -> Iterator[Notice]:
    """From here on USR1 asks for a tidy stop and TERM for one at once. A warning that comes after the work has nothing
    left to stop and is passed over: USR1's default would end the process with another exit code."""
    notice = Notice()
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


def run_cell(
    cell: Cell,
    schema: Schema,
    make_kernel: Callable[[], tuple[Kernel, dict[str, Any]]],
    *,
    shard_rows: int,
    log_seconds: float,
    gpus: int,
) -> int:
    """Bring one cell to its end, or to the signal that stops it. Returns the exit code."""
    beat = Heartbeat(cell.path.parent.parent / "tasks", cell, gpus)
    with heed_signals() as notice, ending_with_its_starters():
        try:
            beat.beat("starting")
            code = _work(cell, schema, make_kernel, shard_rows, log_seconds, beat, notice)
            beat.beat("done" if code == DONE else "requeue")
            return code
        except Terminated as t:
            rest = advised("`make resume` does the rest")
            print(f"stopped by {t}: finished shards are kept; {rest}", file=sys.stderr, flush=True)
            with contextlib.suppress(UserError):
                beat.beat("terminated", error=str(t))
            return 128 + t.signum
        except BaseException as e:
            with contextlib.suppress(Exception):
                beat.beat("failed", error=advised(f"{type(e).__name__}: {e}".replace("UserError: ", ""))[:500])
            raise


def _work(
    cell: Cell,
    schema: Schema,
    make_kernel: Callable[[], tuple[Kernel, dict[str, Any]]],
    shard_rows: int,
    log_seconds: float,
    beat: Heartbeat,
    notice: Notice,
) -> int:
    sweep(cell.path)
    done, bad = scan(cell.path, cell.digest, deep=True, schema=schema, rows=cell.rows)
    for path, reason in bad:
        print(f"shard {path.stem} does not hold: {reason}; it is done again", flush=True)
    set_aside(bad)
    shards = plan_shards(gaps(done, cell.rows), shard_rows)
    left = sum(b - a for a, b in shards)
    print(
        f"cell {cell.index} ({cell.name}): {cell.rows - left} of {cell.rows} rows done, {len(shards)} shards to do",
        flush=True,
    )
    if not shards:
        return DONE
    kernel, about = make_kernel()
    beat.facts["loaded"] = time.time()
    progress = Progress(cell.rows, cell.rows - left, every=log_seconds)
    try:
        return _shards(cell, schema, kernel, shards, {**_provenance(beat), **about}, progress, beat, notice)
    finally:
        progress.close()


def _shards(
    cell: Cell,
    schema: Schema,
    kernel: Kernel,
    shards: list[tuple[int, int]],
    provenance: dict[str, Any],
    progress: Progress,
    beat: Heartbeat,
    notice: Notice,
) -> int:
    """Three shards at once: one being prepared, one computed, one written; the device does not wait for the host."""
    totals: dict[str, float] = {}
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        prepared = ahead.submit(kernel.prepare, *shards[0])
        written: Future[Any] | None = None
        for number, (start, stop) in enumerate(shards):
            if notice.came:
                break
            beat.beat("running", rows_done=progress.done)
            ready = prepared.result()
            if number + 1 < len(shards):
                prepared = ahead.submit(kernel.prepare, *shards[number + 1])
            if (cell.path / f"{start:08d}-{stop:08d}.json").exists() and not _still_missing(cell, start, stop):
                progress.add(stop - start)  # another copy of this task has done it meanwhile
                continue
            began = time.monotonic()
            columns, facts = kernel.compute(ready)
            info = {**provenance, **facts, "seconds": round(time.monotonic() - began, 3)}
            if written:
                written.result()
            written = behind.submit(commit, cell.path, cell.digest, start, stop, schema, columns, info)
            progress.add(stop - start)
            for key, value in facts.items():
                totals[key] = totals.get(key, 0) + value
        else:
            notice.came = False
        if written:
            written.result()
    if totals:
        print(
            "in all: " + ", ".join(f"{key.replace('_', ' ')} {value:,.6g}" for key, value in totals.items()), flush=True
        )
    return REQUEUE if notice.came else DONE


def _still_missing(cell: Cell, start: int, stop: int) -> bool:
    done, _ = scan(cell.path, cell.digest, rows=cell.rows)
    return any(a < stop and start < b for a, b in gaps(done, cell.rows))


def _provenance(beat: Heartbeat) -> dict[str, Any]:
    """Who made a shard: kept in its marker, never in the data."""
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
