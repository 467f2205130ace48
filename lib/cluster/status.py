"""What is done, running, waiting, failed or stale, and what it still costs.

Markers and squeue are the truth; sacct explains."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from lib.base.atomic import listed
from lib.base.errors import UserError
from lib.cluster import slurm
from lib.cluster.live import Ask, cancelled_at, is_alive, local_tasks, slurm_tasks
from lib.run.extent import extent
from lib.run.heartbeat import Beat, heartbeats
from lib.run.parents import Beats, made_again, why_blocked
from lib.store import Cell, Marker, Piece
from lib.store.markers import counted

# blocked: what it reads from is not done, and nobody works on it. held: Slurm waits for `scontrol release`.
STATES = ("done", "running", "pending", "failed", "stale", "unknown", "held", "blocked", "cancelled", "todo")
LOG_TAIL = 4096  # bytes in which a log's last line is looked for


@dataclass
class CellState:
    index: int
    name: str
    rows: int | None
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
    rows: int = 0  # as far as known
    unknown: int = 0  # cells of which it is not known how many rows they have
    done: int = 0
    rows_per_s: float = 0.0
    eta_s: float | None = None
    gpu_hours_used: float = 0.0
    gpu_hours_left: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, object]:
        return asdict(self)


def status(
    label: str,
    cells: Sequence[Cell],
    inputs_note: str = "",
    ask: Ask | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Status:
    """Everything about one experiment, in one pass over its markers. `ask`: a queue that several share; nothing is then
    asked of sacct. `seconds`: what cells take by their estimates."""
    folder = cells[0].folder
    beats = heartbeats(folder)
    queue_note, live = "", local_tasks(cells, beats)
    try:
        live |= slurm_tasks(cells, ask)
    except UserError as e:
        queue_note = str(e)
    with ThreadPoolExecutor(2) as pool:
        ids = {b.job.partition("_")[0] for bs in beats.values() for b in bs if b.job}
        sacct = pool.submit(slurm.accounts, ids, 5.0) if slurm.has_slurm() and ids and not ask else None
        cancelled, of_parents = cancelled_at(folder), cache(heartbeats)
        states = [
            _cell_state(
                cell,
                live.get(cell.name),
                beats.get(cell.name, []),
                cancelled,
                (seconds or {}).get(cell.name),
                of_parents,
            )
            for cell in cells
        ]
        for state in states:
            if queue_note and state.state == "stale" and state.job:
                state.state, state.note = "unknown", "its last word was that it runs"
        if sacct:
            for state in states:
                _explain(state, sacct.result())
    current = {cell.path.name for cell in cells}
    older = sum(path.name not in current for path in listed(folder / "cells"))
    return _total(Status(label, str(folder), states, queue_note, inputs_note, older))


def _cell_state(
    cell: Cell,
    task: slurm.Queued | None,
    beats: list[Beat],
    cancelled: float,
    seconds: float | None,
    of_parents: Beats,
) -> CellState:
    found = extent(cell)
    done, bad = [piece for piece, _ in found.pieces], found.bad
    left = None if found.left is None else sum(b - a for a, b in found.left)
    beats = [b for b in beats if b.digest == cell.digest]
    last = beats[-1] if beats else None
    reached = found.done if cell.rows is None or left is None else cell.rows - left
    state = CellState(cell.index, cell.name, cell.rows, reached, shards=len(done), broken=len(bad))
    state.unscored = sum(m.unscored for m in done if isinstance(m, Marker))
    state.apart = int(counted(done, "rows_apart"))
    state.gpu_hours = sum(m.seconds * m.made.gpus for m in done) / 3600
    state.rows_per_s = _rate(found.pieces, last)
    if last:
        state.job, state.node, state.log = last.job, last.node, last.log
        if not last.job:
            state.elapsed_s = round((time.time() if is_alive(last) else last.updated) - last.started)
    whole = found.whole or bool(left is None and not cell.parents and last and last.state == "done")
    state.state, state.note = ("done", "") if whole else _state(cell, task, last, cancelled, of_parents)
    if task and not whole:
        state.job, state.node = task.id, task.node or state.node
    if state.state == "running" and left is not None:
        whole_s = cell.total / state.rows_per_s if state.rows_per_s else seconds
        state.eta_s = None if whole_s is None else whole_s * left / max(cell.total, 1)
    if again := made_again(cell, done) if whole else []:
        state.note = f"made from an older {', '.join(again)}; to make it again delete {cell.path} and submit it"
    broken = f"{bad[0].path.name}: {bad[0].reason}" if bad and state.state != "done" else ""
    state.note = "; ".join(filter(None, [state.note, broken, _retired(found.retired)]))
    return state


def _state(
    cell: Cell, task: slurm.Queued | None, last: Beat | None, cancelled: float, of_parents: Beats
) -> tuple[str, str]:
    """(state, note) of a cell that is not done."""
    if task and task.held:
        return "held", f"{task.reason}; it waits for ever: scontrol release {task.id}"
    if task and task.state == "PENDING":
        return "pending", task.reason
    if task and (len(task.cells) < 2 or (last and _in_hand(last, task))):
        return "running", task.state.lower() if task.state != "RUNNING" else ""
    if task and not (last and last.job == task.id and last.state in ("failed", "blocked")):
        return "pending", f"in turn, in the task of {task.cells[0]}"
    if why := why_blocked(cell, of_parents):
        return "blocked", why
    if last is None or last.state == "blocked":
        return "todo", ""
    if last.state == "failed":
        return "failed", last.error
    if last.state == "terminated":
        was_meant = last.started < cancelled <= last.updated
        return ("cancelled", "") if was_meant else ("failed", f"stopped by {last.error or 'a signal'}")
    return "stale", "was not requeued" if last.state == "requeue" else _last_line(last.log)


def _in_hand(last: Beat, task: slurm.Queued) -> bool:
    """Whether this cell is the one that its task is at."""
    return last.state in ("starting", "running") and (last.job == task.id if last.job else is_alive(last))


def _last_line(log: str) -> str:
    """Of the log of an attempt that did not say how it ended; a full scratch, say, takes no heartbeat, but the log may
    lie elsewhere."""
    with suppress(OSError):
        with Path(log or "/dev/null").open("rb") as f:
            f.seek(-min(LOG_TAIL, f.seek(0, 2)), 2)
            lines = [line.strip() for line in f.read().decode(errors="replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "")
        if said:
            return f"ended without a word; its log ends: {said[:200]}"
    return "ended without a word"


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
        if state.state in ("stale", "failed") and account.state == "CANCELLED":
            state.state, state.note = "cancelled", ""
        elif state.state in ("stale", "failed") and account.state not in ("RUNNING", "COMPLETED", "PENDING"):
            state.note = f"{account.state} (sacct); {state.note}".rstrip("; ")


def _total(s: Status) -> Status:
    s.rows, s.done = sum(c.rows or 0 for c in s.cells), sum(c.done for c in s.cells)
    s.unknown = sum(c.rows is None for c in s.cells)
    s.counts = {k: sum(c.state == k for c in s.cells) for k in STATES}
    s.gpu_hours_used = sum(c.gpu_hours for c in s.cells)
    s.rows_per_s = sum(c.rows_per_s for c in s.cells if c.state == "running")
    if s.rows_per_s and s.done < s.rows:
        s.eta_s = (s.rows - s.done) / s.rows_per_s
    if any(c.rows_per_s and c.done for c in s.cells):  # on as many GPUs as the done rows were computed on
        s.gpu_hours_left = s.gpu_hours_used * max(0, s.rows - s.done) / s.done
    return s


def missing_cells(s: Status) -> list[int]:
    """Cells that nobody has finished, works on or waits for; a UserError where that is not known."""
    if s.queue_note:
        raise UserError(f"nothing is submitted, since what runs is not known: {s.queue_note}")
    return [c.index for c in s.cells if c.state in ("failed", "stale", "cancelled", "todo")]
