"""A queue of tasks on a box without Slurm: a folder in which its workers, and the processes that these start, claim one
task after the other. A process that has ended a task takes the next by itself, and keeps the model that it has loaded.

    queue/<name>/plan.json, cancelled       written by lib.cluster.local
    queue/<name>/task-<index>/              claimed by whoever made it; exit: the code it ended with
    queue/<name>/<worker>.now               the task in a worker's hands"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.base.atomic import write_bytes


@dataclass(frozen=True)
class Queue:
    folder: Path
    worker: str

    def claim(self, indices: Iterable[int]) -> int | None:
        """The next task that nobody has taken."""
        for index in indices:
            if self.cancelled:
                return None
            try:
                (self.folder / f"task-{index}").mkdir()  # exactly one worker succeeds
            except FileExistsError:
                continue
            write_bytes(self.folder / f"{self.worker}.now", str(index).encode())
            return index
        return None

    @property
    def now(self) -> int:
        return int((self.folder / f"{self.worker}.now").read_text())

    @property
    def cancelled(self) -> bool:
        return (self.folder / "cancelled").exists()

    def ended(self, index: int, code: int) -> None:
        write_bytes(self.folder / f"task-{index}" / "exit", f"{code}\n".encode())


def ours() -> Queue | None:
    """The queue whose worker started this process."""
    folder = os.environ.get("SUITE_QUEUE", "")
    return Queue(Path(folder), os.environ["SUITE_WORKER"]) if folder else None


def log_of(label: str, queue: str, index: int, root: Path) -> Path:
    return root / "slurm" / "logs" / f"{label}-{queue}_{index}.out"


def write_to(log: Path) -> None:
    """From here on this process' words go to another log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.environ["SUITE_LOG"] = str(log)
