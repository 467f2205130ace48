"""What is done, running, waiting, failed or stale, and what it still costs.

Markers and squeue are the truth; sacct explains."""

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lib.base.atomic import read_json
from lib.base.errors import UserError
from lib.base.process import HOST, pid_started
from lib.base.typed import Mistyped, parse
from lib.cluster import local, slurm
from lib.run.extent import extent
from lib.run.lifecycle import Beat
from lib.store import Cell, Marker, Piece
from lib.store.markers import counted

WHOLE = "[!.]*.json"  # a hidden one is being written, or its writer was killed
STATES = ("done", "running", "pending", "failed", "stale", "unknown", "todo")
Ask = Callable[[], list[slurm.Queued]]
UNSEEN_SECONDS = 60  # so long a queue that is asked through a cache may not show a job that was just submitted
FAR_HOST_SECONDS = 900  # without Slurm, a task on another machine counts as alive this long after its last word


@dataclass
class CellState:
    index: int
    name: str
    rows: int
    done: int
    state: str = "todo"  # one of STATES
    shards: int = 0
    broken: int = 0
    unscored: int = 0
    apart: int = 0
    rows_per_s: float = 0.0
    eta_s: float | None = None
    gpu_hours: float = 0.0
    job: str = ""
    node: str = ""
    note: str = ""
    log: str = ""
    elapsed_s: int | None = None  # sacct, all runs of the task
    max_rss: str = ""


@dataclass
class Status:
    label: str
    scratch: str
    cells: list[CellState]
    queue_note: str = ""  # why the queue could not be asked
    inputs_note: str = ""  # why it is not known how many rows there are
    older: int = 0
    rows: int = 0
    done: int = 0
    rows_per_s: float = 0.0
    eta_s: float | None = None
    gpu_hours_used: float = 0.0
    gpu_hours_left: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Submission:
    """What a record of a submission says, as far as anything relies on it."""

    job: str
    array: str = ""
    config: str = ""
    overrides: list[str] = field(default_factory=list)
    time: float = 0.0


def run_folder(cells: list[Cell]) -> Path:
    return cells[0].path.parent.parent


def heartbeats(folder: Path) -> dict[str, list[Beat]]:
    """Attempts by cell name, oldest first."""
    found: dict[str, list[Beat]] = {}
    for path in sorted((folder / "tasks").glob(WHOLE)):
        with suppress(Mistyped):
            beat = replace(parse(Beat, read_json(path)), attempt=path.stem)
            found.setdefault(beat.cell, []).append(beat)
    for beats in found.values():
        beats.sort(key=lambda b: b.started)
    return found


def submissions(folder: Path) -> list[Submission]:
    found = []
    for path in sorted((folder / "submissions").glob(WHOLE)):
        with suppress(Mistyped):
            found.append(parse(Submission, read_json(path)))
    return sorted(found, key=lambda s: s.time)


def arrays_of(label: str, folder: Path, queue: Iterable[slurm.Queued]) -> set[str]:
    """Ids of the arrays that belong to an experiment: submitted by us, seen at work, or queued under its name."""
    known = {s.job for s in submissions(folder) if s.job.isdigit()}
    known |= {b.job.partition("_")[0] for beats in heartbeats(folder).values() for b in beats if b.job}
    return known | {task.array for task in queue if task.name == label}


def is_alive(beat: Beat) -> bool:
    """Whether an attempt without Slurm still runs."""
    if beat.state not in ("starting", "running"):
        return False
    if beat.host == HOST:
        return bool(beat.pid_started) and pid_started(beat.pid) == beat.pid_started
    return time.time() - beat.updated < FAR_HOST_SECONDS


def live_tasks(label: str, cells: list[Cell]) -> dict[int, slurm.Queued]:
    """Queued or running tasks of this experiment, by cell index. A UserError when Slurm does not say."""
    return local_tasks(label, cells) | slurm_tasks(label, run_folder(cells))


def local_tasks(label: str, cells: list[Cell]) -> dict[int, slurm.Queued]:
    """Those of the workers of this box, and what runs without Slurm."""
    folder, found = run_folder(cells), {}
    for index, (state, job) in local.tasks(folder).items():
        reason = "waiting for a worker" if state == "PENDING" else ""
        found[index] = slurm.Queued(job, index, state, reason, HOST, label)
    beats = heartbeats(folder)
    for cell in cells:
        last = beats[cell.name][-1] if cell.name in beats else None
        if last and last.digest == cell.digest and not last.job and is_alive(last):
            found[cell.index] = slurm.Queued(f"pid {last.pid}", None, "RUNNING", "", last.host, label)
    return found


def slurm_tasks(label: str, folder: Path, ask: Ask | None = None) -> dict[int, slurm.Queued]:
    if not slurm.has_slurm():
        return {}
    queue = (ask or slurm.queue)()
    mine = arrays_of(label, folder, queue)
    tasks = sorted((t for t in queue if t.array in mine), key=lambda t: t.state == "RUNNING")
    return _unseen(label, folder, queue) | {t.index: t for t in tasks if t.index is not None}


def _unseen(label: str, folder: Path, queue: list[slurm.Queued]) -> dict[int, slurm.Queued]:
    """What was just submitted, and is neither in the queue nor known to have ended."""
    shown = {task.array for task in queue}
    found = {}
    for record in submissions(folder):
        job, young = record.job, time.time() - record.time < UNSEEN_SECONDS
        if young and job.isdigit() and job not in shown and not slurm.known(job):
            for index in slurm.parse_array(record.array, sys.maxsize):
                found[index] = slurm.Queued(job, index, "PENDING", "just submitted", "", label)
    return found


def status(label: str, cells: list[Cell], gpus: int = 1, inputs_note: str = "", ask: Ask | None = None) -> Status:
    """Everything about one experiment, in one pass over its markers. `ask`: a queue that several share; nothing is then
    asked of sacct."""
    folder = run_folder(cells)
    queue_note, live, beats = "", local_tasks(label, cells), heartbeats(folder)
    try:
        live |= slurm_tasks(label, folder, ask)
    except UserError as e:
        queue_note = str(e)
    with ThreadPoolExecutor(2) as pool:
        ids = {b.job.partition("_")[0] for bs in beats.values() for b in bs if b.job}
        sacct = pool.submit(slurm.accounts, ids, 5.0) if slurm.has_slurm() and ids and not ask else None
        states = [_cell_state(cell, live.get(cell.index), beats.get(cell.name, [])) for cell in cells]
        for state in states:
            if queue_note and state.state == "stale" and state.job:
                state.state, state.note = "unknown", "its last word was that it runs"
        if sacct:
            for state in states:
                _explain(state, sacct.result())
    current = {cell.path.name for cell in cells}
    older = sum(p.name not in current for p in (folder / "cells").iterdir()) if (folder / "cells").is_dir() else 0
    return _total(Status(label, str(folder), states, queue_note, inputs_note, older), gpus)


def _cell_state(cell: Cell, task: slurm.Queued | None, beats: list[Beat]) -> CellState:
    found = extent(cell)
    done, bad, left = [piece for piece, _ in found.pieces], found.bad, sum(b - a for a, b in found.left)
    beats = [b for b in beats if b.digest == cell.digest]
    last = beats[-1] if beats else None
    state = CellState(cell.index, cell.name, cell.rows, cell.rows - left, shards=len(done), broken=len(bad))
    if not cell.rows:
        state.done = sum(rows for _, rows in found.pieces)
    state.unscored = sum(m.unscored for m in done if isinstance(m, Marker))
    state.apart = int(counted(done, "rows_apart"))
    state.gpu_hours = sum(m.seconds * m.made.gpus for m in done) / 3600
    state.rows_per_s = _rate(found.pieces, last)
    if last:
        state.job, state.node, state.log = last.job, last.node, last.log
    if not left and (cell.rows or (last and last.state == "done")):
        state.state = "done"
    elif task and task.state == "PENDING":
        state.state, state.job, state.note = "pending", task.id, task.reason
    elif task:
        state.state, state.job, state.node = "running", task.id, task.node or state.node
        state.note = task.state.lower() if task.state != "RUNNING" else ""
    elif last and last.state == "failed":
        state.state, state.note = "failed", last.error
    elif last and last.state == "terminated":
        state.state, state.note = "failed", f"stopped by {last.error or 'a signal'}"
    elif last:
        state.state, state.note = "stale", "ended without a word" if last.state != "requeue" else "was not requeued"
    if state.state == "running" and state.rows_per_s:
        state.eta_s = left / state.rows_per_s
    broken = f"{bad[0].path.name}: {bad[0].reason}" if bad and state.state != "done" else ""
    state.note = "; ".join(filter(None, [state.note, broken, _retired(found.retired)]))
    return state


def _rate(done: list[tuple[Piece, int]], last: Beat | None) -> float:
    """Rows a second of the latest attempt that finished a piece; of all pieces where that one has none yet."""
    latest = [(piece, rows) for piece, rows in done if last and piece.made.attempt == last.attempt] or done
    seconds = sum(piece.seconds for piece, _ in latest)
    return sum(rows for _, rows in latest) / seconds if seconds else 0.0


def _retired(pieces: list[Piece]) -> str:
    words = sorted({f"{r.why} (read by {r.read_by})" for p in pieces if (r := p.retired)})
    return f"{len(pieces)} retired: {'; '.join(words)}" if words else ""


def _explain(state: CellState, accounts: dict[str, slurm.Account]) -> None:
    account = accounts.get(state.job)
    if account:
        state.elapsed_s, state.max_rss = account.elapsed, account.max_rss
        if state.state in ("stale", "failed") and account.state not in ("RUNNING", "COMPLETED", "PENDING"):
            state.note = f"{account.state} (sacct); {state.note}".rstrip("; ")


def _total(s: Status, gpus: int) -> Status:
    s.rows, s.done = sum(c.rows for c in s.cells), sum(c.done for c in s.cells)
    s.counts = {k: sum(c.state == k for c in s.cells) for k in STATES}
    s.gpu_hours_used = sum(c.gpu_hours for c in s.cells)
    s.rows_per_s = sum(c.rows_per_s for c in s.cells if c.state == "running")
    if s.rows_per_s and s.done < s.rows:
        s.eta_s = (s.rows - s.done) / s.rows_per_s
    known = [(c.rows_per_s, c.done) for c in s.cells if c.rows_per_s and c.done]
    if known:
        mean = sum(n for _, n in known) / sum(n / rate for rate, n in known)  # rows a second of one task
        s.gpu_hours_left = (s.rows - s.done) / mean * gpus / 3600
    return s


def missing_cells(s: Status) -> list[int]:
    """Cells that nobody has finished, works on or waits for; a UserError where that is not known."""
    if s.queue_note:
        raise UserError(f"nothing is submitted, since what runs is not known: {s.queue_note}")
    return [c.index for c in s.cells if c.state in ("failed", "stale", "todo")]
