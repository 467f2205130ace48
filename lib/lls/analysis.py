"""Statistics over an LLS matrix: separation of datasets, contrast of prompts, normalised means, quintiles."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lib.lls.matrix import Cell, Matrix, Measure

REPLICATES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float
    own: int  # rows on either side
    other: int


@dataclass(frozen=True)
class Separation:
    """How well one prompt's LLS tells its own dataset from others. None where there is nothing to compare with."""

    prompt: str
    others: Estimate | None  # AUC against the rows of all other datasets that have an owner
    neutral: Estimate | None  # AUC against the neutral rows
    distance: float | None  # difference of means to neutral in pooled standard deviations
    above: float | None  # share of own rows above the neutral rows' 95th percentile
    other_datasets: int


@dataclass(frozen=True)
class Contrast:
    """A row's LLS under its own prompt minus its mean over the other owners' prompts."""

    values: np.ndarray  # float64[n], NaN where a score is missing
    used: tuple[str, ...]
    absent: tuple[str, ...]  # other owners whose cell on this dataset is not done


@dataclass(frozen=True)
class Group:
    low: float
    high: float
    mean: float
    n: int


def all_scores(matrix: Matrix, measure: Measure) -> dict[Cell, np.ndarray]:
    """Scores of every cell that is done, with NaN for rows without one."""
    return {(p, d): matrix.lls(p, d, measure) for p in matrix.prompts for d in matrix.datasets if matrix.has(p, d)}


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def auc(own: np.ndarray, other: np.ndarray) -> float:
    """P(own > other) + P(own = other) / 2 over all pairs, exact; NaN where either is empty."""
    if not len(own) or not len(other):
        return math.nan
    mine, theirs, cells = _cells(own, other)
    return _wins(np.bincount(mine, minlength=cells), np.bincount(theirs, minlength=cells))


def auc_interval(
    own: np.ndarray, other: np.ndarray, seed: list[int], replicates: int = REPLICATES, level: float = LEVEL
) -> Estimate | None:
    """AUC with a percentile bootstrap interval: rows of either side are drawn with replacement."""
    if not len(own) or not len(other):
        return None
    mine, theirs, cells = _cells(own, other)
    value = _wins(np.bincount(mine, minlength=cells), np.bincount(theirs, minlength=cells))
    rng = np.random.default_rng(seed)
    drawn = [_wins(_resample(mine, cells, rng), _resample(theirs, cells, rng)) for _ in range(replicates)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), len(own), len(other))


def _cells(own: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Every value's place among the distinct own values: odd on one of them, even between two."""
    steps = np.unique(own)
    own_at = 2 * np.searchsorted(steps, own) + 1
    other_at = np.searchsorted(steps, other, "left") + np.searchsorted(steps, other, "right")
    return own_at.astype(np.int32), other_at.astype(np.int32), 2 * len(steps) + 1


def _wins(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Share of pairs won, half for a tie, from counts a cell. Twice the wins are whole numbers: exact below 2^53."""
    twice = 2 * np.cumsum(theirs) - theirs
    return float(mine @ twice) / (2 * float(mine.sum()) * float(theirs.sum()))


def _resample(at: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    return np.bincount(at[rng.integers(0, len(at), len(at), dtype=np.int32)], minlength=cells)


def separations(
    matrix: Matrix, scores: Mapping[Cell, np.ndarray], seed: int = 0, replicates: int = REPLICATES
) -> list[Separation]:
    """One for every prompt with a dataset of its own whose own cell is done."""
    out = []
    for prompt in matrix.owners:
        if (prompt, prompt) not in scores:
            continue
        own = finite(scores[prompt, prompt])
        others = [finite(scores[prompt, d]) for d in matrix.owners if d != prompt and (prompt, d) in scores]
        neutral = finite(scores.get((prompt, matrix.neutral), np.empty(0)))
        start = [seed, zlib.crc32(prompt.encode())]  # an interval does not depend on which other cells are done
        out.append(
            Separation(
                prompt,
                auc_interval(own, np.concatenate([*others, np.empty(0)]), [*start, 0], replicates),
                auc_interval(own, neutral, [*start, 1], replicates),
                _distance(own, neutral),
                float((own > np.quantile(neutral, 0.95)).mean()) if len(own) and len(neutral) else None,
                len(others),
            )
        )
    return out


def _distance(own: np.ndarray, other: np.ndarray) -> float | None:
    if len(own) < 2 or len(other) < 2:
        return None
    squares = (len(own) - 1) * own.var(ddof=1) + (len(other) - 1) * other.var(ddof=1)
    pooled = math.sqrt(squares / (len(own) + len(other) - 2))
    return float(own.mean() - other.mean()) / pooled if pooled else None


def auc_matrix(matrix: Matrix, scores: Mapping[Cell, np.ndarray]) -> np.ndarray:
    """AUC of a prompt's own rows against each dataset under that prompt; NaN on its own and where a cell is missing."""
    out = np.full((len(matrix.owners), len(matrix.datasets)), np.nan)
    for i, prompt in enumerate(matrix.owners):
        for j, dataset in enumerate(matrix.datasets):
            if dataset != prompt and (prompt, prompt) in scores and (prompt, dataset) in scores:
                out[i, j] = auc(finite(scores[prompt, prompt]), finite(scores[prompt, dataset]))
    return out


def contrast(matrix: Matrix, scores: Mapping[Cell, np.ndarray], dataset: str) -> Contrast | None:
    """None where the dataset has no owner, its own cell is not done, or no other owner's is."""
    if dataset not in matrix.owners or (dataset, dataset) not in scores:
        return None
    others = [p for p in matrix.owners if p != dataset]
    used = tuple(p for p in others if (p, dataset) in scores)
    if not used:
        return None
    mean = np.sum([scores[p, dataset] for p in used], axis=0) / len(used)
    return Contrast(scores[dataset, dataset] - mean, used, tuple(p for p in others if p not in used))


def mean_matrix(matrix: Matrix, scores: Mapping[Cell, np.ndarray]) -> np.ndarray:
    """Mean LLS, prompts x datasets; NaN where a cell is missing or has no scored row."""
    out = np.full((len(matrix.prompts), len(matrix.datasets)), np.nan)
    for (prompt, dataset), values in scores.items():
        good = finite(values)
        if len(good):
            out[matrix.prompts.index(prompt), matrix.datasets.index(dataset)] = good.mean()
    return out


def column_normalised(means: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Every column minus its mean, over its standard deviation (n - 1); NaN where that is not known. Both are over the
    reference rows, the owners: a control prompt far from all animals would hide what differs between them."""
    out = np.full(means.shape, np.nan)
    for j, column in enumerate(means.T):
        good = column[reference & np.isfinite(column)]
        if len(good) > 1 and (spread := good.std(ddof=1)) > 0:
            out[:, j] = (column - good.mean()) / spread
    return out


def quintiles(values: np.ndarray, groups: int = 5) -> list[Group]:
    """Scored rows in ascending order in groups of equal size (the first ones get what is left over)."""
    parts = np.array_split(np.sort(finite(values)), groups)
    return [Group(float(p[0]), float(p[-1]), float(p.mean()), len(p)) for p in parts if len(p)]
