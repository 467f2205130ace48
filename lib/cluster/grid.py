"""A pipeline's status: sizes and stages down, what else cells are of across; one letter a cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.base.errors import printable
from lib.cluster.send import Request
from lib.cluster.status import CellState, Status

LETTERS = {
    **{"done": "D", "running": "r", "pending": "p", "failed": "F", "stale": "S", "unknown": "?", "held": "H"},
    **{"blocked": "b", "cancelled": "c", "todo": "."},
}
NOTES = 12  # cells that need a look, said at most


@dataclass(frozen=True)
class Row:
    """A stage."""

    request: Request
    now: Status
    places: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]  # of a cell, by its estimate
    gpus: Mapping[str, int]  # of the task that it is in

    def size(self, index: int) -> str:
        return self.places["SIZES"][index] if "SIZES" in self.places else "-"

    def column(self, index: int) -> str:
        return "-".join(values[index] for axis, values in self.places.items() if axis != "SIZES") or "-"

    def hours_left(self, state: CellState) -> float:
        """GPU-hours; what its estimate says, less what is done."""
        if state.state == "done" or state.name not in self.seconds:
            return 0.0
        share = 1.0 if not state.rows else 1 - state.done / state.rows
        return self.seconds[state.name] * share * self.gpus.get(state.name, 1) / 3600


def axes(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Sizes, and what is across: in the order of the stage that has most."""
    sizes = [row.size(i) for row in rows for i in range(len(row.now.cells))]
    fullest = sorted(rows, key=lambda row: -len(row.now.cells))
    columns = [row.column(i) for row in fullest for i in range(len(row.now.cells))]
    return list(dict.fromkeys(sizes)), list(dict.fromkeys(columns))


def table(spoken: str, rows: Sequence[Row], width: int = 160) -> str:
    sizes, columns = axes(rows)
    longest = max(len(row.now.label) for row in rows)
    short = columns if all(len(column) <= 9 for column in columns) else [column[:9] for column in columns]
    head = " " * (8 + longest) + " ".join(f"{name:>{_wide(name)}}" for name in short)
    lines = [rows[0].request.site.scratch.as_posix(), head + "   done  GPU-h used  left"]
    for size in sizes:
        hours = 0.0
        for number, row in enumerate(rows):
            of = {row.column(i): state for i, state in enumerate(row.now.cells) if row.size(i) == size}
            if not of:
                continue
            cells = " ".join(f"{_letter(of.get(c)):>{_wide(s)}}" for c, s in zip(columns, short, strict=True))
            done = f"{sum(state.state == 'done' for state in of.values())}/{len(of)}"
            used, left = sum(s.gpu_hours for s in of.values()), sum(map(row.hours_left, of.values()))
            hours, first = hours + left, size if not number else ""
            lines.append(f"{first:<7} {row.now.label:<{longest}}{cells}  {done:>6} {used:>11.2f} {left:>5.2f}".rstrip())
        lines.append(f"{'':<7} {size}: {hours:.2f} GPU-hours left")
    return "\n".join([line[: max(width, 80)] for line in lines] + _below(spoken, rows))


def _wide(name: str) -> int:
    return max(len(name), 2)


def _letter(state: CellState | None) -> str:
    if state is None:
        return " "
    if state.state == "running" and state.rows:
        return f"{min(99, 100 * state.done // state.rows):d}%"
    return LETTERS[state.state]


def needless(rows: Sequence[Row]) -> set[Path]:
    """Cells that are not done, and that nothing waits for: all that reads from them is done, brought here perhaps."""
    found, readers, missing = set[Path](), dict[Path, list[Path]](), set[Path]()
    for row in rows:
        for cell, now in zip(row.request.cells_or_names()[0], row.now.cells, strict=True):
            if now.state != "done":
                missing.add(cell.path)
            for parent in cell.parents:
                readers.setdefault(parent.path, []).append(cell.path)
    for path in reversed(list(readers)):  # who reads is read later itself
        if path in missing and not any(one in missing and one not in found for one in readers[path]):
            found.add(path)
    return found


def _below(spoken: str, rows: Sequence[Row]) -> list[str]:
    counts = {state: sum(row.now.counts[state] for row in rows) for state in LETTERS}
    lines = ["cells: " + "  ".join(f"{n} {state} ({LETTERS[state]})" for state, n in counts.items() if n)]
    bad = [(row, s) for row in rows for s in row.now.cells if s.state in ("failed", "stale", "held")]
    lines += [f"{s.name} of {row.now.label} is {s.state}: {printable(s.note)}" for row, s in bad[:NOTES]]
    if counts["blocked"]:
        lines.append("blocked: what they read from is not done, and nobody works on it")
    if spare := len(needless(rows)):
        lines.append(f"{spare} of those that are not done are not needed: all that reads from them is done")
    if len(bad) > NOTES:
        lines.append(f"... and {len(bad) - NOTES} more")
    lines += sorted({f"the queue could not be asked: {row.now.queue_note}" for row in rows if row.now.queue_note})
    lines += sorted({f"what is not known: {row.now.inputs_note}" for row in rows if row.now.inputs_note})
    return [*lines, *(f"next: {step}" for step in _next(spoken, rows, counts, spare))]


def _next(spoken: str, rows: Sequence[Row], counts: Mapping[str, int], spare: int) -> list[str]:
    if counts["done"] + spare == sum(counts.values()):
        return [f"make report {spoken}"]
    steps = []
    if any(row.now.inputs_note for row in rows):
        steps.append(f"make fetch {spoken}")
    if counts["failed"] + counts["stale"]:
        steps.append(f"make logs {spoken}")
    if any(row.now.queue_note for row in rows):
        steps.append(f"make status {spoken}")
    elif counts["failed"] + counts["stale"] + counts["cancelled"] or (counts["todo"] and counts["done"]):
        steps.append(f"make resume {spoken}")
    elif counts["todo"] or counts["blocked"]:
        steps.append(f"make submit-subliminal {spoken}")
    if counts["running"] + counts["pending"]:
        steps.append(f"make status {spoken} WATCH=1")
    return steps
