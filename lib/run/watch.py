"""A job ends with those who started it. Where a batch script or Slurm's daemon was killed outright, nobody ends what it
had started: the job would go on while its GPU is given to the next one.

slurm/preamble.sh names them in SUITE_WATCH: the script's process, and under Slurm that one's parent. A job started by
hand has no such variable: it may well outlive its terminal."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 2.0


@contextlib.contextmanager
def ending_with_its_starters() -> Iterator[None]:
    """TERM to this process as soon as one of them is gone."""
    chain = [int(pid) for pid in os.environ.get("SUITE_WATCH", "").split()]
    if not chain or (os.getppid() != chain[0] and Path(f"/proc/{chain[0]}").exists()):  # of a job that started this one
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(chain, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _watch(chain: list[int], over: threading.Event) -> None:
    while not is_broken(chain):
        if over.wait(SECONDS):
            return
    print("the batch script that started this job is gone; stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def is_broken(chain: list[int]) -> bool:
    """Whether this process is no longer the child of the first, or that one of the second."""
    return [parent_of(pid) for pid in (os.getpid(), *chain)][: len(chain)] != chain


def parent_of(pid: int) -> int | None:
    """None for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
