"""The loop over rows: take the next undone shard, run the kernel, commit, heed signals, report.

It knows rows and columns, not which experiment they belong to."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from lib.base.errors import DONE, REQUEUE
from lib.base.loading import uncollected
from lib.base.progress import Progress
from lib.run.extent import settled
from lib.run.heartbeat import Heartbeat
from lib.run.lifecycle import Notice, Totals, live, provenance
from lib.run.parents import without_older_parents
from lib.store import Cell, Marker, commit, gaps, plan_shards, scan
from lib.store.columns import Schema, Values
from lib.store.markers import Facts, drop_retired, set_aside, sweep

Columns = Mapping[str, Values]


class Kernel(Protocol):
    """What a job computes. `prepare` is host work, done on a thread while the shard before is computed."""

    def prepare(self, start: int, stop: int) -> Any: ...

    def compute(self, prepared: Any) -> tuple[Columns | Callable[[], Columns], Facts]:
        """Columns of the shard, and facts for its marker; numbers among these are summed and said at the end. A
        function does what is left to the host, on the thread that writes, while the next shard is computed."""
        ...


def run_cell(
    cell: Cell,
    schema: Schema,
    make_kernel: Callable[[], tuple[Kernel, Mapping[str, Any]]],
    *,
    shard_rows: int,
    log_seconds: float,
    gpus: int,
    sampled: bool = False,
) -> int:
    """Bring one cell to its end, or to the signal that stops it. `sampled`: rows that are there first stay, whatever
    another copy makes of them; its shards must then be cut alike. Returns the exit code."""

    def work(beat: Heartbeat, notice: Notice) -> int:
        return _work(cell, schema, make_kernel, shard_rows, log_seconds, sampled, beat, notice)

    cell = settled(cell)
    return live(cell, gpus, "shard", "finished shards", work)


def _work(
    cell: Cell,
    schema: Schema,
    make_kernel: Callable[[], tuple[Kernel, Mapping[str, Any]]],
    shard_rows: int,
    log_seconds: float,
    sampled: bool,
    beat: Heartbeat,
    notice: Notice,
) -> int:
    sweep(cell.path)
    done, bad = scan(cell.path, cell.digest, deep=True, schema=schema, rows=cell.total)
    if gaps(done, cell.total):
        done, older = without_older_parents(cell, done)
        bad += older
    for one in bad:
        print(f"shard {one.path.stem} does not hold: {one.reason}; it is done again", flush=True)
    set_aside(bad)
    drop_retired(done)
    shards = plan_shards(gaps(done, cell.total), shard_rows)
    left = sum(b - a for a, b in shards)
    print(
        f"cell {cell.index} ({cell.name}): {cell.total - left} of {cell.total} rows done, {len(shards)} shards to do",
        flush=True,
    )
    if not shards:
        return DONE
    with uncollected("transformers"):
        kernel, about = make_kernel()
    beat.facts["loaded"] = time.time()
    progress = Progress(cell.total, cell.total - left, every=log_seconds)
    try:
        made = {**provenance(beat, cell), **about}
        return _shards(cell, schema, kernel, shards, made, sampled, progress, beat, notice)
    finally:
        progress.close()


def _shards(
    cell: Cell,
    schema: Schema,
    kernel: Kernel,
    shards: list[tuple[int, int]],
    made: dict[str, Any],
    sampled: bool,
    progress: Progress,
    beat: Heartbeat,
    notice: Notice,
) -> int:
    """Three shards at once: one being prepared, one computed, one written; the device does not wait for the host."""
    totals, stopped = Totals(), False
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        prepared = ahead.submit(kernel.prepare, *shards[0])
        written: Future[Marker] | None = None
        for number, (start, stop) in enumerate(shards):
            if stopped := notice.came:
                break
            beat.beat("running", rows_done=progress.done)
            ready = prepared.result()
            if number + 1 < len(shards):
                prepared = ahead.submit(kernel.prepare, *shards[number + 1])
            if (cell.path / f"{start:08d}-{stop:08d}.json").exists() and not _still_missing(cell, start, stop):
                progress.add(stop - start)  # another copy of this task has done it meanwhile
                continue
            began = time.monotonic()
            columns, facts = kernel.compute(ready)
            about = {"seconds": round(time.monotonic() - began, 3), "made": made, "facts": facts, "sampled": sampled}
            if written:
                written.result()
            written = behind.submit(_write, cell, start, stop, schema, columns, about)
            progress.add(stop - start)
            totals.count(facts)
        if written:
            written.result()
    totals.say()
    return REQUEUE if stopped else DONE


def _write(
    cell: Cell,
    start: int,
    stop: int,
    schema: Schema,
    columns: Columns | Callable[[], Columns],
    about: dict[str, Any],
) -> Marker:
    found = columns() if callable(columns) else columns
    return commit(cell.path, cell.digest, start, stop, schema, found, **about)


def _still_missing(cell: Cell, start: int, stop: int) -> bool:
    done, _ = scan(cell.path, cell.digest, rows=cell.total)
    return any(a < stop and start < b for a, b in gaps(done, cell.total))
