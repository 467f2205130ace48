"""A task: one array index, the cells that share one load.

What the indices of an array stand for is frozen at submission, in a file that is named by its content:

    <scratch>/<experiment>/arrays/<first 16 of its sha256>.json"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lib.base.advice import advised
from lib.base.atomic import json_bytes, read_file, write_bytes
from lib.base.errors import DONE, REQUEUE, USER, UserError
from lib.base.log import going_on_without_log
from lib.base.typed import parse
from lib.run import queue
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.heartbeat import Heartbeat
from lib.run.lifecycle import Notice, Terminated, heed_signals, stopped_by
from lib.run.parents import why_blocked, why_without_rows
from lib.run.rows import Kernel, run_cell
from lib.run.site import ROOT
from lib.store import Cell


@dataclass(frozen=True)
class Tasks:
    """What the indices of a submitted array stand for."""

    cells: dict[str, list[str]]  # index, the lowest of its cells -> cells by name
    digests: dict[str, str]  # of each cell

    @property
    def indices(self) -> list[int]:
        return sorted(map(int, self.cells))


def freeze(folder: Path, tasks: Sequence[Sequence[Cell]]) -> str:
    """Write what an array's indices stand for; the name that `frozen` finds it by."""
    cells = {str(task[0].index): [cell.name for cell in task] for task in tasks}
    them = Tasks(cells, {cell.name: cell.digest for task in tasks for cell in task})
    data = json_bytes(asdict(them))
    name = hashlib.sha256(data).hexdigest()[:16]
    write_bytes(_path(folder, name), data)
    return name


def frozen(folder: Path, name: str) -> Tasks:
    if not re.fullmatch("[0-9a-f]{16}", name):
        raise UserError(f"--tasks={name[:40]} is nothing that a submission wrote; submit again")
    path = _path(folder, name)
    try:
        data = read_file(path)
        if hashlib.sha256(data).hexdigest()[:16] == name:
            them = parse(Tasks, json.loads(data), exact=True)
            if all(index.isdecimal() and cells for index, cells in them.cells.items()):
                return them
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{path}, which says what this array's tasks are, is not what was submitted; submit again")


def _path(folder: Path, name: str) -> Path:
    return folder / "arrays" / f"{name}.json"


def run_task(this: Job, work: Callable[[Cell], int]) -> int:
    """Every cell of this task in turn, and on a box without Slurm of the tasks after it: what is loaded stays so."""
    with going_on_without_log(), heed_signals("shard") as notice:
        try:
            code = _cells(this, task_of(this), work, notice)
            ours = queue.ours()
            while ours and code in (DONE, USER) and not notice.came:
                ours.ended(ours.now, code)
                following = ours.claim(frozen(this.folder, this.tasks).indices)
                if following is None:
                    break
                this = replace(this, index=following)
                queue.write_to(queue.log_of(this.experiment.label, ours.folder.name, following, ROOT))
                print(f"task {following} in the process of the one before", flush=True)
                code = _cells(this, task_of(this), work, notice)
            return code
        except Terminated as t:
            return stopped_by(t, "finished pieces")


def run_rows(this: Job, load: Callable[[Cell], tuple[Kernel, Mapping[str, Any]]], sampled: bool = False) -> int:
    """`run_task` for cells of rows: `load` makes a cell's kernel, where there is something left to do."""
    experiment = this.experiment
    schema = experiment.schema(this.site.cache)

    def work(cell: Cell) -> int:
        return run_cell(
            cell,
            schema,
            lambda: load(cell),
            shard_rows=experiment.shard_rows(this.site.cache, cell.name),
            log_seconds=experiment.run.log_seconds,
            gpus=experiment.run.gpus,
            sampled=sampled,
        )

    return run_task(this, work)


def task_of(this: Job) -> list[Cell]:
    """The cells of this array index: as they were submitted, or, by plain sbatch or by hand, one."""
    cells, index = this.cells(), this.chosen()
    if not this.tasks:
        if index >= len(cells):
            names = ", ".join(cell.name for cell in cells)
            raise UserError(f"index {index}: {this.config} has cells 0-{len(cells) - 1} ({names})")
        return [cells[index]]
    tasks, now = frozen(this.folder, this.tasks), {cell.name: cell for cell in cells}
    if str(index) not in tasks.cells:
        raise UserError(f"index {index} is none of this array's: {', '.join(map(str, tasks.indices))}; submit again")
    for name in tasks.cells[str(index)]:
        then, found = tasks.digests[name], now.get(name)
        if found is None or found.digest != then:
            digest = f"digest {found.digest[:8]}" if found else "is gone"
            raise UserError(
                f"{this.config}, its inputs or the kernel changed since this job was submitted "
                f"({name}: {digest}, submitted as {then[:8]}); submit again"
            )
    return [now[name] for name in tasks.cells[str(index)]]


def _cells(this: Job, cells: list[Cell], work: Callable[[Cell], int], notice: Notice) -> int:
    """What is blocked, or fails in one sentence, does not keep the other cells from running."""
    code = DONE
    for cell in cells:
        if notice.came:
            return REQUEUE
        why = "" if extent(cell).whole else why_blocked(cell)
        if cell.rows is None and not why:  # its parents may have ended while the cells before it ran
            cell = next(one for one in this.cells() if one.name == cell.name)
            why = why_without_rows(cell)
        try:
            if why:
                Heartbeat(cell.folder / "tasks", cell, this.experiment.run.gpus).beat("blocked", error=why[:500])
                raise UserError(f"cell {cell.index} ({cell.name}) is blocked: {why}")
            ended = work(cell)
        except UserError as e:
            print(f"error: {advised(str(e))}", file=sys.stderr, flush=True)
            code = USER
        else:
            if ended != DONE:
                return ended
    return code
