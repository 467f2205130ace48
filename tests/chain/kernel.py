"""What the stages compute. CHAIN_HOLD names a folder: a cell goes on once the file <stage>-<trait> is not there (any
more), and fails while <stage>-<trait>.fail is."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from lib.chain.experiment import Stage

from lib.base.errors import UserError
from lib.run.command import Job
from lib.run.extent import states
from lib.run.rows import run_cell
from lib.run.steps import run_steps
from lib.run.task import run_task
from lib.store import Cell, read_columns, scan, scan_folders
from lib.store.columns import Column


def compute(this: Job) -> int:
    stage = this.of(Stage)

    def work(cell: Cell) -> int:
        def make() -> tuple[object, dict[str, str]]:
            this.keep("load", stage.kind, lambda: print("loaded", flush=True))
            return KERNELS[stage.kind](stage, cell), {}

        if stage.kind == "teach":
            return run_steps(cell, make, every=4, log_seconds=1, gpus=0)
        schema = stage.schema(this.site.cache)
        return run_cell(cell, schema, make, shard_rows=4, log_seconds=1, gpus=0, sampled=stage.kind == "write")

    return run_task(this, work)


def wait(stage: Stage, cell: Cell) -> None:
    name = Path(os.environ["CHAIN_HOLD"]) / f"{stage.kind}-{cell.name}"
    while name.exists():
        time.sleep(0.05)
    if name.with_name(f"{name.name}.fail").exists():
        raise UserError(f"the {cell.name} has a cold")


def texts(cell: Cell) -> list[str]:
    found: list[str] = []
    for marker in scan(cell.path, cell.digest, deep=True)[0]:
        with h5py.File(marker.file) as f:
            found += read_columns(f, {"text": Column("text")})["text"]
    return found


class Writes:
    def __init__(self, stage: Stage, cell: Cell) -> None:
        self.stage, self.cell = stage, cell

    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def compute(self, prepared: tuple[int, int]) -> tuple[dict[str, list[str]], dict[str, int]]:
        wait(self.stage, self.cell)
        return {"text": [f"{self.cell.name} {row} {os.urandom(4).hex()}" for row in range(*prepared)]}, {}


class Teaches:
    """A hash over the texts so far."""

    def __init__(self, stage: Stage, cell: Cell) -> None:
        self.stage, self.cell, self.texts = stage, cell, texts(cell.parents[0])

    def restore(self, folder: Path | None, step: int) -> None:
        self.state, self.step = (folder / "state").read_bytes() if folder else b"", step

    def advance(self) -> dict[str, int]:
        wait(self.stage, self.cell)
        self.state = hashlib.sha256(self.state + self.texts[self.step].encode()).digest()
        self.step += 1
        return {"texts": 1}

    def snapshot(self) -> Callable[[Path], None]:
        state = self.state
        return lambda folder: (folder / "state").write_bytes(state) and None


class Judges:
    """Each byte of the last state, over 256."""

    def __init__(self, stage: Stage, cell: Cell) -> None:
        self.stage, self.cell, parent = stage, cell, cell.parents[0]
        last = states(parent, scan_folders(parent.path, parent.digest, deep=True)[0])[-1]
        self.bytes = (last.folder / "state").read_bytes()

    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def compute(self, prepared: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        wait(self.stage, self.cell)
        return {"x": np.frombuffer(self.bytes, np.uint8)[slice(*prepared)] / 256}, {}


class Counts:
    def __init__(self, stage: Stage, cell: Cell) -> None:
        self.first = len(cell.name) + ord(cell.name[0])

    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def compute(self, prepared: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        time.sleep(0.1)
        return {"x": np.cos(self.first + np.arange(*prepared))}, {}


KERNELS = {"write": Writes, "teach": Teaches, "judge": Judges, "count": Counts}
