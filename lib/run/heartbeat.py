"""Heartbeats: small files on scratch that tell which attempt works on a cell, and how the last one ended."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.base.atomic import listed, read_json, write_json
from lib.base.process import HOST, pid_started
from lib.base.typed import Mistyped, parse
from lib.store import Cell

WHOLE = "[!.]*.json"  # a hidden one is being written, or its writer was killed


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
    """Of one attempt at a cell."""

    def __init__(self, folder: Path, cell: Cell, gpus: int) -> None:
        env = os.environ
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")
        again = env.get("SLURM_RESTART_COUNT", "")
        restart = int(again) if again.isdecimal() and len(again) < 9 else 0
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


def heartbeats(folder: Path) -> dict[str, list[Beat]]:
    """Attempts by cell name, oldest first."""
    found: dict[str, list[Beat]] = {}
    for path in listed(folder / "tasks", WHOLE):
        with suppress(Mistyped):
            beat = replace(parse(Beat, read_json(path)), attempt=path.stem)
            found.setdefault(beat.cell, []).append(beat)
    for beats in found.values():
        beats.sort(key=lambda b: b.started)
    return found
