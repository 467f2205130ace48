"""The logs of tasks, and a check of every byte of an experiment's shards."""

from lib.base.advice import advised
from lib.base.atomic import disk_errors
from lib.base.errors import UserError
from lib.cluster.send import Request
from lib.cluster.status import status
from lib.run.extent import extent
from lib.run.heartbeat import Beat, heartbeats
from lib.run.parents import made_again, why_blocked
from lib.store import Cell
from lib.store.columns import Schema
from lib.store.markers import set_aside, sweep

TAIL = 40


def show(r: Request, asked: str) -> None:
    """The end of one cell's log; without a task, a few lines of every cell that failed or went stale."""
    cells, _ = r.cells_or_names()
    task = int(asked) if asked.isdecimal() else None
    if asked and (task is None or task >= len(cells)):
        raise UserError(f"TASK={asked}: the experiment has cells 0-{len(cells) - 1}")
    beats = heartbeats(r.folder)
    if task is None:
        states = status(r.experiment.label, cells).cells
        chosen = [c.index for c in states if c.state in ("failed", "stale")]
        if not chosen:
            print("no cell has failed; TASK=N shows the log of cell N")
    else:
        chosen = [task]
    for index in chosen:
        _tail(cells[index], beats.get(cells[index].name, []), TAIL if task is not None else 8)


def _tail(cell: Cell, beats: list[Beat], lines: int) -> None:
    logs = [b.log for b in beats if b.log]
    if not logs:
        print(f"cell {cell.index} ({cell.name}): no log yet; it has not started, or wrote to your terminal")
        return
    print(f"== cell {cell.index} ({cell.name}): {logs[-1]}")
    try:
        with open(logs[-1], encoding="utf-8", errors="replace") as f:  # noqa: PTH123
            print("".join(f.readlines()[-lines:]).rstrip())
    except OSError as e:
        print(f"cannot be read: {e.strerror}")


def verify(cells: list[Cell], schema: Schema) -> int:
    """Read every byte of every shard; 1 when something does not hold or is missing. What does not hold is set aside:
    a look at names and sizes, which is what `make resume` takes, could not tell it from what does."""
    wrong = missing = pieces = unknown = 0
    for cell in cells:
        sweep(cell.path)
        found = extent(cell, deep=True, schema=schema)
        done, bad = [piece for piece, _ in found.pieces], found.bad
        with disk_errors(cell.path):
            set_aside(bad)
        left = sum(b - a for a, b in found.left or [])
        if found.left is None:
            unknown += 1
            print(f"cell {cell.index} ({cell.name}): how many rows it has is not known: {why_blocked(cell)}")
        for parent in made_again(cell, done):
            print(
                f"cell {cell.index} ({cell.name}) was made from an older {parent}: to make it again, delete {cell.path}"
            )
        pieces, wrong, missing = pieces + len(done), wrong + len(bad), missing + left
        for one in bad:
            name = one.path.name
            print(f"cell {cell.index} ({cell.name}): {name}: {one.reason}; set aside as {name}.bad")
        devices = {m.made.device for m in done} - {""}
        if len(devices) > 1:
            names = ", ".join(sorted(devices))
            print(f"cell {cell.index} ({cell.name}): computed on {names}: last bits may differ between them")
    print(
        f"{pieces} pieces hold, {wrong} do not, {missing} rows are not done"
        + (advised("; run `make resume`") if missing else "")
    )
    return int(bool(wrong or missing or unknown))
