"""The status as a table for a terminal: one line a cell, the totals, and what to type next."""

from lib.base.errors import printable
from lib.base.progress import clock
from lib.cluster.status import CellState, Status

COLUMNS = "{:>4}  {:<14} {:<8} {:>17} {:>5} {:>9} {:>9} {:>9} {:<12} {}"
WATCH_SECONDS = 10  # between looks
MANY = 40  # beyond this many cells, only those that need a look


def table(s: Status, config: str, targets: tuple[str, str], width: int = 160) -> str:
    lines = [f"{s.label}   {s.scratch}"]
    lines.append(
        COLUMNS.format("cell", "name", "state", "rows", "%", "rows/s", "eta", "elapsed", "job", "note").rstrip()
    )
    shown = (
        s.cells if len(s.cells) <= MANY else [c for c in s.cells if c.state not in ("done", "pending", "todo")][:MANY]
    )
    lines += [_line(c)[:width].rstrip() for c in shown]
    if len(shown) < len(s.cells):
        lines.append(f"      ... {len(s.cells) - len(shown)} more cells (all with --json)")
    lines += totals(s)
    if s.counts.get("done") and (n := sum(c.unscored for c in s.cells)):
        lines.append(f"rows without a score (empty or too long): {n}")
    if n := sum(c.apart for c in s.cells):
        lines.append(f"rows whose context and answer give other tokens together than the two that are scored: {n}")
    if s.older:
        lines.append(f"{s.older} folders of earlier settings lie beside these in {s.scratch}/cells")
    if s.queue_note:
        lines.append(f"the queue could not be asked: {s.queue_note}")
    if s.inputs_note:
        lines.append(f"how many rows there are is not known: {s.inputs_note}")
    return "\n".join([*lines, *(f"next: {step}" for step in next_steps(s, config, targets))])


def totals(s: Status) -> list[str]:
    """Two lines: the cells and rows, the GPU-hours and the speed."""
    counts = "  ".join(f"{n} {state}" for state, n in s.counts.items() if n)
    percent = 100 * s.done / max(s.rows, 1)
    left = "" if s.gpu_hours_left is None else f", {s.gpu_hours_left:.2f} left"
    if s.inputs_note:
        speed = "how many to do is not known"
    elif s.done >= s.rows and not s.unknown:
        speed = "complete"
    elif s.eta_s is not None:
        speed = f"{s.rows_per_s:.4g} rows/s, eta {clock(s.eta_s)}"
    else:
        speed = "loading" if s.counts["running"] else "nothing is running"
    return [
        f"cells: {counts}    rows: {s.done:,} of {s.rows:,}{'+?' * bool(s.unknown)} ({percent:.1f}%)    {speed}",
        f"GPU-hours: {s.gpu_hours_used:.2f} used{left}",
    ]


def _line(c: CellState) -> str:
    rate = f"{c.rows_per_s:.4g}" if c.rows_per_s else "-"
    eta = clock(c.eta_s) if c.eta_s is not None else "-"
    elapsed = clock(c.elapsed_s) if c.elapsed_s is not None else "-"
    note = printable(" ".join(filter(None, [c.node if c.state == "running" else "", c.max_rss, c.note])))
    percent = "?" if c.rows is None else f"{100 * c.done // max(c.rows, 1)}%"
    rows = f"{c.done:,}/?" if c.rows is None else f"{c.done:,}/{c.rows:,}"
    return COLUMNS.format(c.index, c.name, c.state, rows, percent, rate, eta, elapsed, c.job or "-", note)


def next_steps(s: Status, config: str, targets: tuple[str, str]) -> list[str]:
    submit, results = targets
    tail = f" {config}"
    steps = []
    if s.inputs_note:
        steps.append(f"make fetch{tail}")
    look = next((c for c in s.cells if c.state in ("failed", "stale")), None)
    if look:
        steps.append(f"make logs{tail} TASK={look.index}")
    held = sorted({c.job for c in s.cells if c.state == "held"})
    steps += [f"scontrol release {job}" for job in held[:3]]
    if s.queue_note:  # to submit without knowing what runs is refused
        steps.append(f"make status{tail}")
    elif any(s.counts[state] for state in ("failed", "stale", "cancelled")) or (s.counts["todo"] and s.done):
        steps.append(f"make resume{tail}")
    elif s.counts["todo"]:
        steps.append(f"make {submit}{tail}")
    if not s.queue_note and (s.counts["running"] or s.counts["pending"]):
        steps.append(f"make status{tail} WATCH=1")
    if s.done >= s.rows and not s.inputs_note and not s.unknown:
        steps.append(f"make {results}{tail}")
    return steps
