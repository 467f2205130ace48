"""LLS of many system prompts on many datasets: what was stored, and how a row's score is made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lib.base.errors import UserError

Cell = tuple[str, str]  # (prompt, dataset)


@dataclass(frozen=True)
class Measure:
    """How token shifts become a row's score. The default is the original experiment's: mean, without the end token.

    `end` counts the end-of-turn token as one more after the response; `first` keeps the first k of these tokens."""

    kind: Literal["mean", "sum"] = "mean"
    end: bool = False
    first: int | None = None

    @classmethod
    def parse(cls, text: str) -> Measure:
        """'mean', 'sum', 'mean+end', 'sum@20', 'mean+end@20'."""
        found = re.fullmatch(r"(mean|sum)(\+end)?(?:@([1-9]\d*))?", text.strip())
        if not found:
            raise UserError(
                f"measure '{text}': write mean or sum, then +end and @k as wanted, e.g. mean, sum+end, mean@20"
            )
        kind: Literal["mean", "sum"] = "mean" if found[1] == "mean" else "sum"
        return cls(kind, bool(found[2]), int(found[3]) if found[3] else None)

    def __str__(self) -> str:
        return self.kind + ("+end" if self.end else "") + (f"@{self.first}" if self.first else "")

    @property
    def caption(self) -> str:
        what = "mean log-likelihood shift per token" if self.kind == "mean" else "sum of log-likelihood shifts of a row"
        end = ", end-of-turn token included" if self.end else ""
        return what + end + (f", first {self.first} tokens" if self.first else "")

    @property
    def axis(self) -> str:
        over = "nats per token" if self.kind == "mean" else "nats per row"
        end = ", with end of turn" if self.end else ""
        return f"LLS ({over}{end}{f', first {self.first} tokens' if self.first else ''})"


@dataclass(frozen=True)
class Pass:
    """Log-likelihoods of one dataset's responses under one condition: a system prompt, or the base."""

    status: np.ndarray  # uint8[n], 0 = scored
    tokens: np.ndarray  # int32[n], response tokens; 0 where there is no score
    sums: np.ndarray  # float64[n], over the response tokens, without the end
    end: np.ndarray | None = None  # float32[n], log p of the end-of-turn token
    values: np.ndarray | None = None  # float32[sum(tokens)], a value a response token, row after row
    joint: np.ndarray | None = None  # uint8[n], 0 = context and answer give other tokens together

    def __post_init__(self) -> None:
        n = len(self.status)
        lengths = {"tokens": len(self.tokens), "sums": len(self.sums), "end": n if self.end is None else len(self.end)}
        wrong = [name for name, length in lengths.items() if length != n]
        if self.values is not None and len(self.values) != int(np.sum(self.tokens, dtype=np.int64)):
            wrong.append("values")
        if wrong:
            raise ValueError(f"a pass of {n} rows has another length in: {', '.join(wrong)}")

    @property
    def scored(self) -> np.ndarray:
        return (self.status == 0) & (self.tokens > 0)

    def row_values(self, row: int) -> np.ndarray | None:
        """A row's log-probabilities token by token, float64; None where they were not stored."""
        if self.values is None:
            return None
        start = int(np.sum(self.tokens[:row], dtype=np.int64))
        return np.asarray(self.values[start : start + int(self.tokens[row])], np.float64)

    def total(self, measure: Measure, where: str) -> np.ndarray:
        """Sum of log-probabilities of the tokens that the measure counts, float64."""
        if measure.first is None:
            sums = np.asarray(self.sums, np.float64)
        elif self.values is None:
            raise UserError(f"{where}: measure {measure} needs every token's value; compute with score.per_token=true")
        else:
            tokens = np.asarray(self.tokens, np.int64)
            row = np.repeat(np.arange(len(tokens)), tokens)
            at = np.arange(len(row)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
            kept = at < measure.first
            sums = np.bincount(row[kept], weights=self.values[kept], minlength=len(tokens))
        if not measure.end:
            return sums
        if self.end is None:
            raise UserError(
                f"{where}: measure {measure} needs the end-of-turn token; compute with score.end_of_turn=true"
            )
        reached = True if measure.first is None else self.tokens < measure.first
        return np.where(reached, sums + np.asarray(self.end, np.float64), sums)

    def counted(self, measure: Measure) -> np.ndarray:
        """How many tokens of each row the measure counts, int64."""
        tokens = np.asarray(self.tokens, np.int64) + (1 if measure.end else 0)
        return tokens if measure.first is None else np.minimum(tokens, measure.first)


@dataclass(frozen=True)
class Rescored:
    """A sample of rows of one cell, scored again in higher precision."""

    rows: np.ndarray  # int[m], row indices
    shifts: np.ndarray  # float64[m], prompt minus base, summed over the response tokens without the end


@dataclass(frozen=True)
class Noise:
    rows: int
    sd: float  # of score minus rescored
    bias: float  # its mean


@dataclass(frozen=True)
class Matrix:
    """Partial is normal: a cell that is not done is absent. A prompt owns the dataset of its own name."""

    prompts: tuple[str, ...]
    datasets: tuple[str, ...]
    base: Mapping[str, Pass]
    passes: Mapping[Cell, Pass]
    rescored: Mapping[Cell, Rescored] = field(default_factory=dict)
    neutral: str = "neutral"  # the dataset written without any system prompt, if there is one of this name
    wanted: tuple[Cell, ...] | None = (
        None  # the cells that the experiment asks for; None: every prompt on every dataset
    )

    @property
    def owners(self) -> tuple[str, ...]:
        """Prompts with a dataset of their own, in the order of prompts."""
        return tuple(p for p in self.prompts if p in self.datasets and p != self.neutral)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All that the experiment asks for, done or not."""
        every = tuple((p, d) for p in self.prompts for d in self.datasets)
        return every if self.wanted is None else self.wanted

    @property
    def missing(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if not self.has(*cell))

    @property
    def diagonal(self) -> bool:
        """Whether datasets are asked for under their own prompts alone: nothing can be compared between prompts."""
        return all(p == d for p, d in self.cells)

    def has(self, prompt: str, dataset: str) -> bool:
        return (prompt, dataset) in self.passes and dataset in self.base

    def lls(self, prompt: str, dataset: str, measure: Measure = Measure()) -> np.ndarray:
        """float64[n]; NaN where there is no score."""
        if not self.has(prompt, dataset):
            raise UserError(f"LLS of prompt {prompt} on dataset {dataset} is not done; run `make resume`")
        here, base, where = self.passes[prompt, dataset], self.base[dataset], f"prompt {prompt} on dataset {dataset}"
        scored = self._scored(here, base, where)
        shift = here.total(measure, where) - base.total(measure, f"base of dataset {dataset}")
        count = np.maximum(here.counted(measure), 1)
        return np.where(scored, shift / count if measure.kind == "mean" else shift, np.nan)

    def shifts(self, prompt: str, dataset: str, row: int) -> np.ndarray | None:
        """A row's shift token by token, float64; None where values were not stored or the row has no score."""
        here, base = self.passes[prompt, dataset], self.base[dataset]
        if not (here.scored[row] and base.scored[row]):
            return None
        with_prompt, without = here.row_values(row), base.row_values(row)
        return None if with_prompt is None or without is None else with_prompt - without

    def noise(self, prompt: str, dataset: str, measure: Measure = Measure()) -> Noise | None:
        """What computing in low precision adds to a row's score; None where it was not measured for this measure."""
        sample = self.rescored.get((prompt, dataset))
        if sample is None or measure.end or measure.first is not None or not self.has(prompt, dataset):
            return None
        exact = np.asarray(sample.shifts, np.float64)
        if measure.kind == "mean":
            exact = exact / np.maximum(self.passes[prompt, dataset].tokens[sample.rows], 1)
        off = self.lls(prompt, dataset, measure)[sample.rows] - exact
        off = off[np.isfinite(off)]
        return Noise(len(off), float(off.std(ddof=1)), float(off.mean())) if len(off) > 1 else None

    @staticmethod
    def _scored(here: Pass, base: Pass, where: str) -> np.ndarray:
        if len(here.status) != len(base.status):
            raise UserError(f"{where}: {len(here.status)} rows, its base has {len(base.status)}; compute both again")
        scored = here.scored & base.scored
        if np.any(here.tokens[scored] != base.tokens[scored]):
            raise UserError(f"{where}: responses have other token counts than in the base pass; compute both again")
        return scored
