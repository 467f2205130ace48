"""What an experiment will take, before it is submitted: rows, shards, bytes, seconds and GPU-hours, cell by cell."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.base.errors import UserError
from lib.run.experiment import TFLOPS, Estimate, Experiment
from lib.run.extent import Extent, extent
from lib.store import Cell, plan_shards


@dataclass(frozen=True)
class CellPlan:
    cell: Cell
    found: Extent
    shards: list[tuple[int, int]]  # to do
    estimate: Estimate | None  # of the whole cell
    gpus: int  # of its task

    @property
    def rows(self) -> int | None:
        """To do."""
        return None if self.found.left is None else sum(b - a for a, b in self.found.left)

    @property
    def bytes(self) -> int | None:
        """Of the whole cell, before compression."""
        return self.estimate.bytes if self.estimate else None

    @property
    def seconds(self) -> float | None:
        """Computing what is to do."""
        if self.found.whole or self.estimate is None:
            return 0.0 if self.found.whole else None
        share = 1.0 if self.rows is None else self.rows / max(self.cell.total, 1)
        return self.estimate.seconds * share

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.gpus / 3600


def plan(experiment: Experiment, cells: Sequence[Cell], cache: Path, gpu: str) -> list[CellPlan]:
    plans = []
    for cell in cells:
        found = extent(cell)
        shards = plan_shards(found.left or [], experiment.shard_rows(cache, cell.name))
        gpus = experiment.needs(cache, cell).gpus
        plans.append(CellPlan(cell, found, shards, experiment.estimate(cache, cell, gpu), gpus))
    return plans


def estimates(experiment: Experiment, cells: Sequence[Cell], cache: Path, gpu: str) -> dict[str, float]:
    """Seconds of the cells that can be estimated."""
    found = {}
    for cell in cells:
        with suppress(UserError):  # what it is made from may be gone since
            if estimate := experiment.estimate(cache, cell, gpu):
                found[cell.name] = estimate.seconds
    return found


def table(plans: list[CellPlan], gpu: str, share: float) -> str:
    line = "{:>4}  {:<14} {:>9} {:>8} {:>7} {:>10} {:>10}"
    lines: list[str] = [line.format("cell", "name", "rows", "to do", "shards", "bytes", "GPU-hours")]
    for p in plans:
        values = (_or(p.cell.rows), _or(p.rows), len(p.shards), _or(p.bytes, si), _or(p.gpu_hours, "{:.3f}".format))
        lines.append(line.format(p.cell.index, p.cell.name, *values))
    sums = [_sum([p.cell.rows for p in plans]), _sum([p.rows for p in plans]), sum(len(p.shards) for p in plans)]
    sums += [_sum([p.bytes for p in plans], si), _sum([p.gpu_hours for p in plans], "{:.3f}".format)]
    lines.append(line.format("", "all", *sums))
    how = f"{share:.0%}" if share else "what its size was measured to reach"
    lines.append(
        f"GPU-hours: arithmetic at {how} of {TFLOPS.get(gpu, TFLOPS['h200'])} TFLOP/s ({gpu}), without loading"
    )
    return "\n".join(lines)


def _or(value: float | None, form: Callable[[float], str] = str) -> str:
    return "?" if value is None else form(value)


def _sum(values: Sequence[float | None], form: Callable[[float], str] = str) -> str:
    known = [value for value in values if value is not None]
    return form(sum(known)) + ("+?" if len(known) < len(values) else "")


def si(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
