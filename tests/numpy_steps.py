"""A job of steps with a kernel of plain numpy: SGD with momentum on a matrix, each step from random rows.

python numpy_steps.py FOLDER
CELL, STEPS, EVERY, KEEP, STEP_SECONDS: of the work. SAMPLED: each process draws from a seed of its own."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.base.errors import exit_with
from lib.run.steps import run_steps
from lib.store import Cell

SIZE, RATE, MOMENTUM = 12, 0.05, 0.9


def cell_in(folder: Path, index: int = 0, steps: int = 60) -> Cell:
    return Cell(index, f"sgd-{index}", steps, "5a" * 32, folder / "run" / "cells" / f"sgd-{index}-5a5a5a5a")


class Sgd:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def restore(self, folder: Path | None, step: int) -> None:
        self.dice = np.random.default_rng(self.seed)
        self.truth = self.dice.normal(size=(SIZE, SIZE))
        self.weights, self.speed, self.step = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE)), step
        if folder:
            self.weights, self.speed = np.load(folder / "weights.npy"), np.load(folder / "optimizer" / "speed.npy")
            self.dice.bit_generator.state = json.loads((folder / "random.json").read_text())

    def advance(self) -> dict[str, float | str]:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        x = self.dice.normal(size=(4, SIZE))
        error = x @ (self.weights - self.truth)
        self.speed = MOMENTUM * self.speed - RATE * x.T @ error / len(x)
        self.weights = self.weights + self.speed
        self.step += 1
        return {"examples": len(x), "loss": float(np.square(error).mean()), "optimizer": "sgd"}

    def snapshot(self) -> Callable[[Path], None]:
        weights, speed, dice = self.weights.copy(), self.speed.copy(), json.dumps(self.dice.bit_generator.state)

        def save(folder: Path) -> None:
            np.save(folder / "weights.npy", weights)
            (folder / "optimizer").mkdir()
            np.save(folder / "optimizer" / "speed.npy", speed)
            (folder / "random.json").write_text(dice)

        return save


def in_one_go(index: int, steps: int) -> Sgd:
    """What an undisturbed run ends with, without the suite's loop."""
    kernel = Sgd(index)
    kernel.restore(None, 0)
    for _ in range(steps):
        kernel.advance()
    return kernel


def main() -> int:
    env = os.environ
    index = int(env.get("CELL", env.get("SLURM_ARRAY_TASK_ID", "0")))
    one, keep = cell_in(Path(sys.argv[1]), index, int(env.get("STEPS", "60"))), env.get("KEEP", "last")
    seed = os.getpid() if env.get("SAMPLED") else index
    return run_steps(
        one,
        lambda: (Sgd(seed), {"device": "cpu"}),
        every=int(env.get("EVERY", "10")),
        keep=json.loads(keep) if keep.startswith("[") else keep,
        log_seconds=0.0,
        gpus=0,
    )


if __name__ == "__main__":
    exit_with(main)
