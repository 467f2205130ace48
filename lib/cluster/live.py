"""Who works on which cell: tasks in Slurm's queue, workers of this box, and what runs without either."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.base.atomic import listed, read_json
from lib.base.errors import UserError
from lib.base.process import HOST, pid_started
from lib.base.typed import Mistyped, parse
from lib.cluster import local, slurm
from lib.run.heartbeat import WHOLE, Beat, heartbeats
from lib.run.task import Tasks, frozen
from lib.store import Cell

Ask = Callable[[], list[slurm.Queued]]
Live = dict[str, slurm.Queued]  # cell -> the task that it is in
OTHER = "submitted for other settings or inputs than now, and will stop: make cancel, then submit"
UNSEEN_SECONDS = 60  # so long a queue that is asked through a cache may not show a job that was just submitted
FAR_HOST_SECONDS = 900  # without Slurm, a task on another machine counts as alive this long after its last word


def asked_once() -> Ask:
    """The queue, for several who want it at the same moment; that it could not be asked is told to each of them."""
    found: list[list[slurm.Queued] | UserError] = []

    def ask() -> list[slurm.Queued]:
        if not found:
            try:
                found.append(slurm.queue())
            except UserError as e:
                found.append(e)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    return ask


@dataclass(frozen=True)
class Submission:
    """What a record of a submission says, as far as anything relies on it."""

    job: str
    array: str = ""  # indices
    tasks: str = ""  # what they stand for, by lib.run.task.freeze
    config: str = ""
    overrides: list[str] = field(default_factory=list)
    at_once: int = 0  # tasks, at most
    gpus: int = 0  # of a task
    lane: str = ""  # of a pipeline, by lib.cluster.lanes
    lane_gpus: int = 0
    time: float = 0.0


def submissions(folder: Path) -> list[Submission]:
    found = []
    for path in listed(folder / "submissions", WHOLE):
        with suppress(Mistyped):
            found.append(parse(Submission, read_json(path)))
    return sorted(found, key=lambda s: s.time)


def jobs_of(folder: Path, queue: Iterable[slurm.Queued]) -> set[str]:
    """Ids of the arrays that belong to an experiment: submitted by us, seen at work, or queued under its name."""
    known = {s.job for s in submissions(folder) if s.job.isdigit()}
    known |= {b.job.partition("_")[0] for beats in heartbeats(folder).values() for b in beats if b.job}
    return known | {task.array for task in queue if task.name == folder.name}


def is_alive(beat: Beat) -> bool:
    """Whether an attempt without Slurm still runs."""
    if beat.state not in ("starting", "running"):
        return False
    if beat.host == HOST:
        return bool(beat.pid_started) and pid_started(beat.pid) == beat.pid_started
    return time.time() - beat.updated < FAR_HOST_SECONDS


@dataclass(frozen=True)
class Cancelled:
    """When `make cancel` was last said."""

    time: float


def cancelled_at(folder: Path) -> float:
    with suppress(Mistyped):
        return parse(Cancelled, read_json(folder / "cancelled.json")).time
    return 0.0


def live_tasks(cells: Sequence[Cell], ask: Ask | None = None) -> Live:
    """The cells of one experiment that are in queued or running tasks. A UserError when Slurm does not say."""
    return local_tasks(cells) | slurm_tasks(cells, ask)


def local_tasks(cells: Sequence[Cell], beats: Mapping[str, list[Beat]] | None = None) -> Live:
    """Those of the workers of this box, and what runs without Slurm. `beats`: heartbeats that were read already."""
    folder, found = cells[0].folder, {}
    for index, names, state, queue in local.tasks(folder):
        reason = "waiting for a worker" if state == "PENDING" else ""
        task = slurm.Queued(queue, index, state, reason, HOST, folder.name, names)
        found |= dict.fromkeys(names, task)
    beats = heartbeats(folder) if beats is None else beats
    for cell in cells:
        last = beats[cell.name][-1] if cell.name in beats else None
        if last and last.digest == cell.digest and not last.job and is_alive(last) and cell.name not in found:
            found[cell.name] = slurm.Queued(f"pid {last.pid}", None, "RUNNING", "", last.host, folder.name)
    return found


def slurm_tasks(cells: Sequence[Cell], ask: Ask | None = None) -> Live:
    if not slurm.has_slurm():
        return {}
    folder, queue = cells[0].folder, (ask or slurm.queue)()
    records = {record.job: record.tasks for record in submissions(folder)}
    names: dict[int | None, str] = {cell.index: cell.name for cell in cells}
    mine = jobs_of(folder, queue)
    found, digests = _unseen(folder, queue), {cell.name: cell.digest for cell in cells}
    for task in sorted((t for t in queue if t.array in mine), key=lambda t: t.state == "RUNNING"):
        named = task.tasks or records.get(task.array, "")
        held = names_in(folder, named, task.index, names)
        now = replace(task, cells=held)
        if task.state == "PENDING" and not task.held and _are_others(tasks_of(folder, named), held, digests):
            now = replace(now, reason=OTHER)
        found |= dict.fromkeys(held, now)
    return found


def _are_others(tasks: Tasks | None, names: Iterable[str], digests: Mapping[str, str]) -> bool:
    """Whether a task stands for what these cells are no more; it looks, and stops, at its start."""
    return tasks is not None and any(tasks.digests.get(name) != digests.get(name) for name in names)


def names_in(folder: Path, named: str, index: int | None, names: Mapping[int | None, str]) -> tuple[str, ...]:
    """The cells of an array index; one, where plain sbatch submitted it."""
    if tasks := tasks_of(folder, named):
        return tuple(tasks.cells.get(str(index), []))
    return (names[index],) if index in names else ()


def tasks_of(folder: Path, named: str) -> Tasks | None:
    with suppress(UserError):
        return frozen(folder, named) if named else None
    return None


def _unseen(folder: Path, queue: list[slurm.Queued]) -> Live:
    """What was just submitted, and is neither in the queue nor known to have ended."""
    shown, found = {task.array for task in queue}, {}
    for record in submissions(folder):
        job, young = record.job, time.time() - record.time < UNSEEN_SECONDS
        if young and job.isdigit() and job not in shown and not slurm.known(job):
            tasks = tasks_of(folder, record.tasks)
            for index, names in tasks.cells.items() if tasks else ():
                task = slurm.Queued(job, int(index), "PENDING", "just submitted", "", folder.name, tuple(names))
                found |= dict.fromkeys(names, task)
    return found
