"""Lanes: the site's GPUs, parted among the sizes of a pipeline.

The arrays of a lane follow one another, stage after stage, and each keeps to the lane's GPUs. So all stages together
never use more than SUITE_THROTTLE says, and no size waits for another one. (Slurm itself holds a number of tasks over
one array alone, or by what an administrator sets up.)"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lib.cluster.arrays import Array
from lib.cluster.live import asked_once, live_tasks, submissions
from lib.cluster.plan import estimates
from lib.cluster.send import Request
from lib.run.extent import extent


@dataclass(frozen=True)
class Demand:
    """Of a size."""

    work: float  # GPU-seconds
    least: int  # GPUs of its largest task


@dataclass
class Lane:
    name: str
    gpus: int  # at once
    sizes: set[str]
    arrays: set[str] = field(default_factory=set)  # what is in it: whoever comes next waits for these

    def after(self, array: Array) -> frozenset[str]:
        """What an array of this lane waits for: none of its tasks where it waits for the whole of another array."""
        return frozenset(one for one in array.after if one.partition("_")[0] not in self.arrays) | self.arrays

    def tasks(self, array: Array) -> int:
        return max(1, self.gpus // max(array.needs.gpus, 1))


Lanes = Mapping[str, Lane]  # by size


def lane_named(lanes: Lanes, name: str) -> Lane | None:
    return next((lane for lane in lanes.values() if lane.name == name), None)


def placed(array: Array, lanes: Lanes) -> tuple[Array, Lane | None]:
    """An array behind what is in its lane, where it has one."""
    lane = lane_named(lanes, array.lane)
    return (replace(array, after=lane.after(array)), lane) if lane else (array, None)


def size_of(r: Request, index: int) -> str:
    """'' for all cells of a stage that knows no sizes."""
    return r.experiment.places().get("SIZES", {index: ""})[index]


def lanes_of(requests: Sequence[Request], wanted: Mapping[str, Sequence[int]]) -> Lanes:
    """`wanted`: by stage, the cells that may be submitted. Stages that need no GPU are in no lane."""
    on_gpus = [one for one in requests if one.experiment.on_gpu]
    return part(demands(on_gpus, wanted), live_lanes(on_gpus), on_gpus[0].site.throttle) if on_gpus else {}


def demands(requests: Sequence[Request], wanted: Mapping[str, Sequence[int]]) -> dict[str, Demand]:
    found: dict[str, Demand] = {}
    for one in requests:
        cells = [one.cells[i] for i in wanted.get(one.experiment.label, ()) if not extent(one.cells[i]).whole]
        seconds = estimates(one.experiment, cells, one.site.cache, one.site.gpu)
        for cell in cells:
            size, gpus = size_of(one, cell.index), max(1, one.experiment.needs(one.site.cache, cell).gpus)
            was = found.get(size, Demand(0.0, 1))
            found[size] = Demand(was.work + gpus * seconds.get(cell.name, 1.0), max(was.least, gpus))
    return found


def live_lanes(requests: Sequence[Request]) -> list[Lane]:
    """Of what is queued or running. An array that was submitted by itself is a lane of its own."""
    found: dict[tuple[str, int], Lane] = {}
    ask = asked_once()
    for one in requests:
        records, cells = {record.job: record for record in submissions(one.folder)}, {c.name: c for c in one.cells}
        live = live_tasks(one.cells, ask)
        counts = Counter(array for array, _ in {(task.array, task.index) for task in live.values()})
        for name, task in live.items():
            record, count = records.get(task.array), counts[task.array]
            gpus = min(count, record.at_once) * max(record.gpus, 1) if record else count
            key = (record.lane, record.lane_gpus) if record and record.lane_gpus else (task.array, gpus)
            lane = found.setdefault(key, Lane(*key, set()))
            lane.arrays.add(task.array)
            if record and record.lane_gpus:
                lane.sizes.add(size_of(one, cells[name].index))
    return list(found.values())


def part(wanted: Mapping[str, Demand], live: Sequence[Lane], throttle: int) -> dict[str, Lane]:
    """A lane for each size: the one that it is in already; else one of the GPUs that are left, by the work that there
    is, several sizes in one where there are too few; else at the end of one that is there."""
    found = {size: lane for lane in live for size in lane.sizes if size in wanted and lane.gpus >= wanted[size].least}
    groups = [({size}, one) for size, one in wanted.items() if size not in found]
    free = throttle - sum(lane.gpus for lane in live)
    while len(groups) > 1 and sum(one.least for _, one in groups) > free:
        groups.sort(key=lambda group: -group[1].work)
        (some, a), (more, b) = groups.pop(), groups.pop()
        groups.append((some | more, Demand(a.work + b.work, max(a.least, b.least))))
    if not groups:
        return found
    least = sum(one.least for _, one in groups)
    if least <= free or not live:
        widths = [one.least for _, one in groups]
        for _ in range(free - least):
            place = max(range(len(groups)), key=lambda i: groups[i][1].work / widths[i])
            widths[place] += 1
        new = [Lane(" ".join(sorted(sizes)), gpus, sizes) for (sizes, _), gpus in zip(groups, widths, strict=True)]
        return found | {size: lane for lane in new for size in lane.sizes}
    [(sizes, one)] = groups
    if fitting := [lane for lane in live if lane.gpus >= one.least]:
        last = min(fitting, key=lambda lane: len(lane.arrays))
        return found | dict.fromkeys(sizes, last)
    every = set[str]().union(*(lane.arrays for lane in live))
    return dict.fromkeys(wanted, Lane(" ".join(sorted(wanted)), max(throttle, one.least), set(wanted), every))
