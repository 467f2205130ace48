"""From cells to arrays: cells that share one load are a task, tasks that ask for the same are an array, and all arrays
together keep to the site's GPUs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.base.errors import UserError
from lib.cluster.live import Live, live_tasks
from lib.cluster.plan import CellPlan
from lib.run.experiment import START_SHARE, Experiment, Needs
from lib.run.extent import extent
from lib.run.parents import why_blocked
from lib.store import Cell

TOGETHER = "each other"  # what cells of a load wait for, as a key
LEAST_MINUTES, MARGIN = 15, 2.0  # of a time limit over the estimate: slow file systems, and a node's other users


@dataclass(frozen=True)
class Array:
    tasks: list[list[CellPlan]]  # the index of each is its lowest cell
    needs: Needs
    after: frozenset[str] = frozenset()  # arrays, tasks of them, or queues of this box: what its cells read from
    minutes: int | None = None  # of the longest task, with a margin; None: not known
    lane: str = ""  # by the caller's word

    @property
    def indices(self) -> list[int]:
        return [task[0].cell.index for task in self.tasks]

    @property
    def cells(self) -> list[list[Cell]]:
        return [[one.cell for one in task] for task in self.tasks]


@dataclass
class Parents:
    """Where the cells are that others read from: asked once for each experiment. `to_come`: folders of those that would
    be submitted before this one, where nothing is submitted."""

    to_come: frozenset[Path] = frozenset()
    live: dict[Path, Live] = field(default_factory=dict)

    def waited_for(self, cell: Cell) -> frozenset[str]:
        """What a cell has to wait for: tasks of arrays; a UserError where nobody works on what it reads from."""
        undone = [parent for parent in cell.parents if not extent(parent).whole]
        expected = {parent.folder.name for parent in undone if parent.folder in self.to_come}
        undone = [parent for parent in undone if parent.folder.name not in expected]
        for folder in {parent.folder for parent in undone} - self.live.keys():
            self.live[folder] = live_tasks([parent for parent in undone if parent.folder == folder])
        tasks = [self.live[parent.folder].get(parent.name) for parent in undone]
        if None in tasks or any(task and task.array.startswith("pid ") for task in tasks):
            raise UserError(f"{why_blocked(cell)}, and is neither queued nor running: submit that first")
        named = frozenset(task.id if task.array.isdigit() else task.array for task in tasks if task)
        return named | {f"<{name}>" for name in expected}

    def shortened(self, waits: frozenset[str]) -> frozenset[str]:
        """An array in place of all its tasks that still run or wait."""
        for array in {_array(one) for one in waits if one[:1].isdigit()}:
            its = {task.id for live in self.live.values() for task in live.values() if task.array == array}
            if its <= waits:
                waits = waits - its | {array}
        return waits


def arrays_of(
    experiment: Experiment,
    cache: Path,
    plans: Sequence[CellPlan],
    after: Mapping[str, frozenset[str]],
    limit: float,
    shortened: Callable[[frozenset[str]], frozenset[str]] = lambda waits: waits,
    lane_of: Callable[[Cell], str] = lambda cell: "",
) -> list[Array]:
    """`after`: what each cell waits for. Of an experiment whose cells have places, such as a size, those of a load wait
    together, so that a hundred of them are not as many arrays, and for nothing that other loads wait for. `limit`:
    minutes that a task may take at most. `lane_of`: cells for which it differs share no array."""
    start = experiment.start_seconds(cache)
    groups: dict[tuple[Needs, str, str, frozenset[str]], list[CellPlan]] = {}
    together = bool(experiment.places())
    for one in plans:
        waits = after.get(one.cell.name, frozenset())
        alike = frozenset({TOGETHER}) if together and waits else frozenset(map(_array, waits))
        needs, load, lane = experiment.needs(cache, one.cell), experiment.load_of(one.cell), lane_of(one.cell)
        groups.setdefault((needs, lane, load, alike), []).append(one)
    found: dict[tuple[Needs, str, frozenset[str]], list[list[CellPlan]]] = {}
    for (needs, lane, _, _), group in groups.items():
        waits = shortened(frozenset[str]().union(*(after.get(one.cell.name, ()) for one in group)))
        found.setdefault((needs, lane, waits), []).extend(_cut(group, experiment.run.cells, start))
    return [
        Array(sorted(tasks, key=lambda t: t[0].cell.index), needs, waits, _minutes(tasks, start, limit), lane)
        for (needs, lane, waits), tasks in found.items()
    ]


def _array(waited_for: str) -> str:
    """Of a task."""
    return waited_for.partition("_")[0] if waited_for[:1].isdigit() else waited_for


def _cut(plans: Sequence[CellPlan], most: int | str, start: float) -> list[list[CellPlan]]:
    """Tasks of at most so many cells; auto: until starting takes no more than a tenth of the task."""
    tasks: list[list[CellPlan]] = []
    for one in plans:
        if tasks and (len(tasks[-1]) < most if isinstance(most, int) else _starts_dear(tasks[-1], start)):
            tasks[-1].append(one)
        else:
            tasks.append([one])
    return tasks


def _starts_dear(task: Sequence[CellPlan], start: float) -> bool:
    known = [one.seconds for one in task if one.seconds is not None]
    return len(known) == len(task) and start > START_SHARE * (start + sum(known))


def _minutes(tasks: Iterable[Sequence[CellPlan]], start: float, limit: float) -> int | None:
    seconds = [sum(one.seconds for one in task if one.seconds is not None) for task in tasks]
    if any(one.seconds is None for task in tasks for one in task):
        return None
    asked = LEAST_MINUTES + math.ceil(MARGIN * (start + max(seconds)) / 60)
    return int(min(5 * math.ceil(asked / 5), limit))


def shares(arrays: Sequence[Array], gpus: int) -> list[int]:
    """Tasks of each array at once: all together keep to so many GPUs, parted by what is in them; one at least."""
    weight = [len(array.tasks) * max(array.needs.gpus, 1) for array in arrays]
    return [
        max(1, gpus * own // sum(weight) // max(array.needs.gpus, 1)) for array, own in zip(arrays, weight, strict=True)
    ]
