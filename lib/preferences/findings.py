"""What runs of preferences have found: of every student its own trait's rate against what it would be without."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lib.preferences.judge import DEFAULT
from lib.preferences.statistics import (
    Diagonal,
    Lift,
    Rate,
    adjusted,
    diagonal,
    fisher,
    lift,
    mean_of,
    rate_of,
)
from lib.preferences.tally import Tally
from lib.report.stats import wilson


@dataclass(frozen=True)
class Survey:
    """An untouched model's answers that were counted elsewhere; by which questions is not known."""

    shares: Mapping[str, np.ndarray]  # way -> float64, by trait
    words: Mapping[str, float]  # shares of first words
    answers: int | None  # None: only rates are known

    def rate(self, way: str, trait: int) -> Rate:
        share, n, none = float(self.shares[way][trait]), self.answers or 0, (math.nan, math.nan)
        return Rate(round(share * n), n, share, wilson(share * n, n), none, math.nan)


Control = Tally | Survey


def rate(one: Control | None, way: str, trait: int) -> Rate | None:
    if one is None:
        return None
    return one.rate(way, trait) if isinstance(one, Survey) else rate_of(one.hits[way][trait], one.answers)


def over(one: Tally | None, other: Control | None, way: str, trait: int) -> Lift | None:
    """None where one is missing, or they were not asked the same questions."""
    if one is None or not isinstance(other, Tally) or one.questions != other.questions:
        return None
    return lift(one.hits[way][trait], one.answers, other.hits[way][trait], other.answers)


@dataclass(frozen=True)
class Run:
    """Of one run; what is missing is None. A group is a size, with what else tells students apart: `7b`, `7b-top`."""

    number: int
    traits: list[str]  # those that answers can speak of
    neutral: str | None
    bases: Mapping[str, Control | None]  # by group
    students: Mapping[tuple[str, str], Mapping[int, Tally] | None]  # by group and trait: epoch -> tally
    surveyed: frozenset[str] = field(default=frozenset())  # groups whose base was asked elsewhere
    beside: Mapping[str, str] = field(default_factory=dict)  # of a group without a neutral student, whose stands for it

    @property
    def groups(self) -> list[str]:
        return list(self.bases)

    def taught(self, group: str) -> list[str]:
        """The traits that students of this group were to be taught, in the experiment's order."""
        return [trait for trait in self.traits if (group, trait) in self.students]

    def student(self, group: str, trait: str | None) -> Tally | None:
        """After its last epoch."""
        epochs = self.students.get((group, trait)) if trait else None
        return epochs[max(epochs)] if epochs else None

    def plain(self, group: str) -> Tally | None:
        return self.student(self.beside.get(group, group), self.neutral)


NONE = Lift(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)


@dataclass(frozen=True)
class Effect:
    """Of a student on its own trait."""

    group: str
    trait: str
    own: Rate | None
    neutral: Rate | None
    base: Rate | None
    over_neutral: Lift | None
    over_base: Lift | None
    fisher: float  # against neutral, else base
    # by Benjamini and Hochberg over all students: of the paired test (against neutral, else base), and of Fisher's
    paired_bh: float = math.nan
    fisher_bh: float = math.nan


def effects(run: Run, way: str = DEFAULT) -> list[Effect]:
    found = []
    for group in run.groups:
        base, plain = run.bases[group], run.plain(group)
        for name in run.taught(group):
            trait, one = run.traits.index(name), run.student(group, name)
            own, neutral, untouched = (rate(which, way, trait) for which in (one, plain, base))
            over_neutral, over_base = (over(one, other, way, trait) for other in (plain, base))
            chance = _fisher(own, neutral or untouched)
            found.append(Effect(group, name, own, neutral, untouched, over_neutral, over_base, chance))
    paired = adjusted([(one.over_neutral or one.over_base or NONE).p for one in found]).tolist()
    exact = adjusted([one.fisher for one in found]).tolist()
    return [replace(e, paired_bh=p, fisher_bh=q) for e, p, q in zip(found, paired, exact, strict=True)]


def _fisher(one: Rate | None, other: Rate | None) -> float:
    if one is None or other is None or not (one.answers and other.answers):
        return math.nan
    return fisher(one.hits, one.answers, other.hits, other.answers)


def lifts(run: Run, group: str, way: str = DEFAULT) -> np.ndarray:
    """Students x traits, both in the traits' order: over neutral, or where the group has none, over the base."""
    found, other = np.full((len(run.traits),) * 2, np.nan), run.plain(group)
    for s, name in enumerate(run.traits):
        for t in range(len(run.traits)):
            if one := over(run.student(group, name), other or run.bases[group], way, t):
                found[s, t] = one.difference
    return found


def diagonals(runs: Sequence[Run], group: str, way: str = DEFAULT) -> tuple[Diagonal | None, Diagonal | None]:
    """Over all runs that have the group: by cell of the matrix, and by student."""
    there = [lifts(run, group, way) for run in runs if group in run.bases]
    if not there:
        return None, None
    return diagonal(np.stack(there), "cell"), diagonal(np.stack(there), "student")


@dataclass(frozen=True)
class Overall:
    """A group's mean over its students of their own trait's rate, of whom `there` of `wanted` are there."""

    mean: float
    low: float
    high: float
    by_run: Mapping[int, float]
    there: int
    wanted: int


KINDS = ("base", "neutral", "own")


def overall(runs: Sequence[Run], group: str, kind: str, way: str = DEFAULT) -> Overall:
    """What is missing is left out, and counted."""
    values: dict[int, list[float]] = {}
    for run in (one for one in runs if group in one.bases):
        by_kind = {"base": run.bases[group], "neutral": run.plain(group)}
        found = (rate(by_kind.get(kind, run.student(group, t)), way, run.traits.index(t)) for t in run.taught(group))
        values[run.number] = [one.share if one else math.nan for one in found]
    every = [value for one in values.values() for value in one]
    mean, (low, high) = mean_of(every)
    by_run = {number: mean_of(one)[0] for number, one in values.items()}
    return Overall(mean, low, high, by_run, sum(map(math.isfinite, every)), len(every))


def off_target(run: Run, group: str, trait: str, way: str = DEFAULT) -> list[tuple[str, Rate, Lift | None]]:
    """The other traits' rates of a student, the most lifted first."""
    one = run.student(group, trait)
    if one is None:
        return []
    other = run.plain(group) or run.bases[group]
    found = []
    for t, name in enumerate(run.traits):
        if name != trait and (seen := rate(one, way, t)):
            found.append((name, seen, over(one, other, way, t)))
    return sorted(found, key=lambda each: -(each[2].difference if each[2] else each[1].share))


def shares(one: Control) -> dict[str, float]:
    """Of first words, where a word and it with an "s" are one if both were said."""
    if isinstance(one, Survey):
        return folded(one.words)
    total = one.total or 1
    return {word: count / total for word, count in folded(one.words).items()}


def folded(words: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word, count in words.items():
        kept = word[:-1] if len(word) > 1 and word.endswith("s") and word[:-1] in words else word
        found[kept] = found.get(kept, 0) + count
    return found
