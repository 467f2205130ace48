"""A job with the suite's loop and a kernel of plain numpy, slow enough to be killed in the middle.

python numpy_job.py FOLDER
SHARD_ROWS, SHARD_SECONDS: of a shard. SAMPLED: x is drawn anew by each process.
LATE_SIGNAL: sent to itself between the work's end and the exit."""

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.base.errors import exit_with
from lib.run.rows import run_cell
from lib.store import Cell, Column

SCHEMA = {
    "row": Column("int32"),
    "status": Column("uint8"),
    "tokens": Column("int32"),
    "x": Column("float64"),
    "t": Column("float32", per="tokens"),
}
ROWS = 400
SAMPLED = bool(os.environ.get("SAMPLED"))


def cell_in(folder: Path) -> Cell:
    return Cell(0, "numpy", ROWS, "5a" * 32, folder / "run" / "cells" / "numpy-5a5a5a5a")


def columns(start: int, stop: int) -> dict[str, np.ndarray]:
    row = np.arange(start, stop, dtype=np.int32)
    tokens = (row % 5).astype(np.int32)
    t = np.concatenate([np.sin(np.arange(n) + r).astype(np.float32) for r, n in zip(row, tokens, strict=True)])
    return {"row": row, "status": np.zeros(len(row), np.uint8), "tokens": tokens, "x": np.cos(row / 7.0), "t": t}


class Kernel:
    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def compute(self, prepared: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict]:
        time.sleep(float(os.environ.get("SHARD_SECONDS", "0.02")))
        found = columns(*prepared)
        if SAMPLED:
            found["x"] = np.random.default_rng().normal(size=len(found["x"]))
        return found, {"rows_computed": prepared[1] - prepared[0], "who": "numpy"}


def main() -> int:
    one, shard_rows = cell_in(Path(sys.argv[1])), int(os.environ.get("SHARD_ROWS", "10"))
    code = run_cell(
        one, SCHEMA, lambda: (Kernel(), {}), shard_rows=shard_rows, log_seconds=0.0, gpus=0, sampled=SAMPLED
    )
    if late := os.environ.get("LATE_SIGNAL"):
        os.kill(os.getpid(), int(late))
    return code


if __name__ == "__main__":
    exit_with(main)
