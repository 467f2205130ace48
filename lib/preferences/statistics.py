"""What counts of answers say: rates, lifts, whether they are chance, and how many answers it takes to see one.

Answers to one question resemble each other, so that 5,000 of them to 50 questions tell less than 5,000 on their own:
intervals and tests by question take questions as what was drawn. The others (Wilson, Fisher) say what they assume."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from lib.report.stats import wilson

LEVEL, POWER = 0.05, 0.8
NOTHING = 1e-12  # of a rate, or a standard error of one: what rounding leaves of differences that are all the same

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """A share of answers, with 95 % intervals."""

    hits: int
    answers: int
    share: float
    wilson: Interval  # as if every answer were drawn by itself
    clustered: Interval  # questions drawn, and answers to them: Wilson's with what these answers are worth
    effect: float  # the design's: so many of these answers are worth one drawn by itself; 1 at least


def rate_of(hits_Q: np.ndarray, answers_Q: np.ndarray) -> Rate:
    hits, answers = int(hits_Q.sum()), int(answers_Q.sum())
    asked = int((answers_Q > 0).sum())
    if not answers:
        return Rate(0, 0, math.nan, (math.nan, math.nan), (math.nan, math.nan), math.nan)
    share = hits / answers
    if asked < 2:
        return Rate(hits, answers, share, wilson(hits, answers), (math.nan, math.nan), math.nan)
    by_chance = share * (1 - share) / answers
    variance = asked / (asked - 1) * float(((hits_Q - share * answers_Q) ** 2).sum()) / answers**2
    effect = max(1.0, variance / by_chance) if by_chance else 1.0
    worth = answers / effect
    interval = wilson(share * worth, worth, float(stats.t.ppf(1 - LEVEL / 2, asked - 1)))
    return Rate(hits, answers, share, wilson(hits, answers), interval, effect)


@dataclass(frozen=True)
class Lift:
    """Of one model's rate over another's on the same questions: the mean difference by question, by a paired t-test."""

    difference: float
    low: float
    high: float
    p: float
    error: float  # standard error
    up: int  # questions
    down: int


def lift(hits_Q: np.ndarray, answers_Q: np.ndarray, other_hits_Q: np.ndarray, other_answers_Q: np.ndarray) -> Lift:
    both = (answers_Q > 0) & (other_answers_Q > 0)
    return paired(hits_Q[both] / answers_Q[both] - other_hits_Q[both] / other_answers_Q[both])


def paired(apart_Q: np.ndarray) -> Lift:
    """Of what two models differ by at each question."""
    count, up, down = len(apart_Q), int((apart_Q > 0).sum()), int((apart_Q < 0).sum())
    if count < 2:
        return Lift(float(apart_Q.mean()) if count else math.nan, math.nan, math.nan, math.nan, math.nan, up, down)
    mean, error = float(apart_Q.mean()), float(apart_Q.std(ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    if error < NOTHING:  # no question differs from another: what flipping signs could say at most
        p = 2.0 ** (1 - count) if abs(mean) > NOTHING else 1.0
    else:
        p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Lift(mean, mean - half, mean + half, p, error, up, down)


def fisher(hits: int, answers: int, other_hits: int, other_answers: int) -> float:
    """Exact and two-sided, as if every answer were drawn by itself."""
    table = [[hits, answers - hits], [other_hits, other_answers - other_hits]]
    return float(stats.fisher_exact(table).pvalue)


def adjusted(ps: Sequence[float]) -> np.ndarray:
    """By Benjamini and Hochberg: below 0.05 here, at most one in twenty of all that lie there is expected to be chance.
    NaN (no test) stays so, and is not counted."""
    given = np.asarray(ps, np.float64)
    there = np.flatnonzero(np.isfinite(given))
    order = there[np.argsort(-given[there], kind="stable")]  # the largest first
    ranks = np.arange(len(order), 0, -1)
    found = np.full(len(given), np.nan)
    found[order] = np.minimum(1.0, np.minimum.accumulate(given[order] * len(order) / ranks))
    return found


@dataclass(frozen=True)
class Diagonal:
    """How much more a student's own trait rises than its row and its column of the matrix let expect."""

    effect: float
    low: float
    high: float
    p: float
    error: float
    lifts: int
    clusters: int


def diagonal(lifts_RST: np.ndarray, by: Literal["cell", "student"] = "cell") -> Diagonal | None:
    """Of lifts by run, student's trait and asked trait, in one order; NaN: missing. Ordinary least squares of
    lift ~ C(student) + C(asked) + is_diagonal. Errors are robust, by cell of the matrix (which runs share), or
    by student (a run's: what one trait gains in it, others lose). None where the effect cannot be told."""
    runs, students, asked = lifts_RST.shape
    r, s, t = (index.ravel() for index in np.indices((runs, students, asked)))
    there = np.isfinite(lifts_RST.ravel())
    r, s, t, y = r[there], s[there], t[there], lifts_RST.ravel()[there]
    rest = np.column_stack([s[:, None] == np.arange(students), t[:, None] == np.arange(asked)]).astype(np.float64)
    own = (s == t).astype(np.float64)
    if not len(y):
        return None
    # the effect and its error are those of the regression of what the rows and columns do not explain
    own_left, y_left = (v - rest @ np.linalg.lstsq(rest, v, rcond=None)[0] for v in (own, y))
    spread = float(own_left @ own_left)
    _, groups = np.unique(s * asked + t if by == "cell" else r * students + s, return_inverse=True)
    clusters, known = int(groups.max()) + 1, int(np.linalg.matrix_rank(rest)) + 1
    if spread < 1e-9 or clusters < 2 or len(y) <= known:
        return None
    effect = float(own_left @ y_left) / spread
    by_group = np.bincount(groups, own_left * (y_left - effect * own_left))
    small = clusters / (clusters - 1) * (len(y) - 1) / (len(y) - known)
    error = math.sqrt(small * float(by_group @ by_group)) / spread
    # what the error was seen on are the diagonal's clusters: with the degrees of all, intervals of 15 are too short
    freedom = len(np.unique(groups[own > 0])) - 1
    if freedom < 2 or error < NOTHING:  # of two, rows and columns take the scatter
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(effect) / error, freedom))
    return Diagonal(effect, effect - half, effect + half, p, error, len(y), clusters)


def mean_of(values: Sequence[float]) -> tuple[float, Interval]:
    """Of students, each a draw, with the t-interval; NaN: missing, and left out."""
    good = np.asarray([v for v in values if math.isfinite(v)], np.float64)
    if len(good) < 2:
        return float(good.mean()) if len(good) else math.nan, (math.nan, math.nan)
    half = float(stats.t.ppf(1 - LEVEL / 2, len(good) - 1)) * float(good.std(ddof=1)) / math.sqrt(len(good))
    return float(good.mean()), (float(good.mean()) - half, float(good.mean()) + half)


def needed_answers(base: float, points: float, effect: float = 1.0, power: float = POWER) -> int | None:
    """Of each of two models, so that a rate of base + points is told from base at 5 %, two-sided, so often; normal
    approximation, and times the design's effect. None where the rate would leave [0, 1]."""
    other = base + points
    if not points or not 0 <= other <= 1:
        return None
    middle, spread = (base + other) / 2, base * (1 - base) + other * (1 - other)
    by_chance = stats.norm.ppf(1 - LEVEL / 2) * math.sqrt(2 * middle * (1 - middle))
    missed = stats.norm.ppf(power) * math.sqrt(spread)
    return math.ceil(effect * ((by_chance + missed) / points) ** 2)


def smallest_seen(error: float, questions: int, power: float = POWER) -> float:
    """The lift that the paired test sees so often, given its standard error as it is now."""
    if questions < 2:
        return math.nan
    return error * float(stats.t.ppf(1 - LEVEL / 2, questions - 1) + stats.t.ppf(power, questions - 1))


def correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """Spearman's, of the pairs that are both there."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return math.nan, len(pairs)
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)
