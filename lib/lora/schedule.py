"""Which rows a step is over, and how large it is: functions of the step's number and the seed alone, so that a training
goes on anywhere. As transformers' Trainer has it: each epoch takes every row once, in an order of its own, and its last
step takes what is left (10,000 rows are 166 steps of 60 and one of 40)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Schedule:
    rows: int
    step_rows: int
    epochs: int
    learning_rate: float
    warmup: int  # steps
    seed: int

    @property
    def steps_an_epoch(self) -> int:
        return -(-self.rows // self.step_rows)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_an_epoch

    def epoch_of(self, step: int) -> int:
        """From 1, as steps are."""
        return (step - 1) // self.steps_an_epoch + 1

    def rate(self, step: int) -> float:
        """Up from 0 over the warm-up, and down to 0 at the end; the very first step only fills Adam's moments."""
        before = step - 1
        if before < self.warmup:
            return self.learning_rate * before / self.warmup
        return self.learning_rate * (self.steps - before) / max(1, self.steps - self.warmup)

    def rows_of(self, step: int) -> list[int]:
        start = (step - 1) % self.steps_an_epoch * self.step_rows
        return order(self.rows, self.seed, self.epoch_of(step))[start : start + self.step_rows].tolist()


@lru_cache(2)
def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
