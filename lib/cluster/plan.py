"""What an experiment will take, before it is submitted: shards, rows, bytes and GPU-hours, cell by cell."""

from dataclasses import dataclass
from pathlib import Path

from lib.run.experiment import Experiment
from lib.run.extent import extent
from lib.store import Cell, plan_shards

# bf16 matmul TFLOP/s. h200: 8192^3 with torch 2.11 on an H200, measured. The others: data-sheet dense figures times the
# 0.80 of its own that the H200 reached. cpu: float32 on two cores.
TFLOPS = {"h200": 790.0, "b200": 1800.0, "h100": 790.0, "a100": 250.0, "cpu": 0.08}


@dataclass(frozen=True)
class CellPlan:
    cell: Cell
    rows: int  # to do
    shards: list[tuple[int, int]]  # to do
    bytes: int  # of the whole cell, before compression
    gpu_hours: float


def plan(experiment: Experiment, cells: list[Cell], cache: Path, gpu: str) -> list[CellPlan]:
    rate = TFLOPS.get(gpu, TFLOPS["h200"]) * 1e12 * experiment.share
    plans, schema = [], experiment.schema(cache)
    for cell, cost in zip(cells, experiment.costs(cache), strict=True):
        missing = extent(cell).left
        rows = sum(b - a for a, b in missing)
        width = sum(c.value_bytes * (cost.values if c.per else 1) for c in schema.values())
        hours = rows * cost.flops / rate / 3600
        shards = plan_shards(missing, experiment.shard_rows(cache, cell.name))
        plans.append(CellPlan(cell, rows, shards, round(width * cell.rows), hours))
    return plans


def table(plans: list[CellPlan], gpu: str, share: float) -> str:
    line = "{:>4}  {:<14} {:>9} {:>8} {:>7} {:>10} {:>10}"
    lines: list[str] = [line.format("cell", "name", "rows", "to do", "shards", "bytes", "GPU-hours")]
    for p in plans:
        values = (p.cell.index, p.cell.name, p.cell.rows, p.rows, len(p.shards), si(p.bytes), f"{p.gpu_hours:.3f}")
        lines.append(line.format(*values))
    rows, todo, shards = sum(p.cell.rows for p in plans), sum(p.rows for p in plans), sum(len(p.shards) for p in plans)
    hours = sum(p.gpu_hours for p in plans)
    lines.append(line.format("", "all", rows, todo, shards, si(sum(p.bytes for p in plans)), f"{hours:.3f}"))
    lines.append(
        f"GPU-hours: arithmetic at {share:.0%} of {TFLOPS.get(gpu, TFLOPS['h200'])} TFLOP/s ({gpu}), without loading"
    )
    return "\n".join(lines)


def si(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
