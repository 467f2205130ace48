"""The logs of tasks, and a check of every byte of an experiment's shards."""

from lib.cluster.status import heartbeats, run_folder, status
from lib.cluster.submit import Request
from lib.errors import UserError
from lib.store import Cell, gaps, scan
from lib.store.shards import Schema, sweep

TAIL = 40


def show(r: Request, task: int | None) -> None:
    """The end of one cell's log; without a task, a few lines of every cell that failed or went stale."""
    if task is not None and not 0 <= task < len(r.cells):
        raise UserError(f"TASK={task}: the experiment has cells 0-{len(r.cells) - 1}")
    beats = heartbeats(run_folder(r.cells))
    if task is None:
        states = status(r.experiment.label, r.cells, r.experiment.run.gpus).cells
        chosen = [c.index for c in states if c.state in ("failed", "stale")]
        if not chosen:
            print("no cell has failed; TASK=N shows the log of cell N")
    else:
        chosen = [task]
    for index in chosen:
        _tail(r.cells[index], beats.get(r.cells[index].name, []), TAIL if task is not None else 8)


def _tail(cell: Cell, beats: list[dict], lines: int) -> None:
    logs = [b["log"] for b in beats if b.get("log")]
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
    """Read every byte of every shard; 1 when something does not hold or is missing."""
    wrong = missing = shards = 0
    for cell in cells:
        sweep(cell.path)
        done, bad = scan(cell.path, cell.digest, deep=True, schema=schema, rows=cell.rows)
        left = sum(b - a for a, b in gaps(done, cell.rows))
        shards, wrong, missing = shards + len(done), wrong + len(bad), missing + left
        for path, reason in bad:
            print(f"cell {cell.index} ({cell.name}): {path.name}: {reason}")
        devices = {m.info.get("device", "") for m in done} - {""}
        if len(devices) > 1:
            names = ", ".join(sorted(devices))
            print(f"cell {cell.index} ({cell.name}): computed on {names}: last bits may differ between them")
    print(
        f"{shards} shards hold, {wrong} do not, {missing} rows are not done"
        + ("; run `make resume`" if wrong or missing else "")
    )
    return int(bool(wrong or missing))
