"""What a sweep shows: per prompt before and after, with intervals, against the controls, and when nothing is shown.

Suffixes: P prompts, K completions of each, B resamples, D draws of a control."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import comb
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib.evaluation.statistics import TOXIC, by_prompt
from lib.pruning.looks import DENSE
from lib.pruning.methods import DRAWN, Method, Ranking
from lib.pruning.sweep import Sweep
from lib.store import Cell, read_done

RESAMPLES, SEED = 4000, 0
REPETITION = "repeated tokens"  # in a judge's place, where a sweep's effect is repetition
LEVEL = 0.05  # of all tests of a family together, by Holm
LEAST = 0.005  # of mean toxicity, from 0 to 1: a smaller fall is none that anybody would see
HARMLESS = 0.05  # relative rise of perplexity that is called kept

Measure = Literal["average", "maximum", "any"]
MEASURES: dict[Measure, str] = {
    "average": "mean",
    "maximum": "expected maximum",
    "any": f"prompts with a completion at {TOXIC} or above",
}


@dataclass(frozen=True)
class Seen:
    """A model without some neurons (or dense), as one row of a sweep has it."""

    ranking: Ranking | None  # None: dense
    neurons: int
    perplexity: Mapping[str, float]
    nll: Mapping[str, np.ndarray]  # of each window
    predictions: Mapping[str, np.ndarray]
    toxicity: Mapping[tuple[str, str], np.ndarray]  # (set, judge) -> [P, K]
    unique: Mapping[str, np.ndarray]  # set -> [P, K]
    texts: Mapping[str, list[list[str]]]
    tasks: Mapping[str, tuple[float, float]]

    def per_prompt(self, name: str, judge: str, measure: Measure = "average") -> np.ndarray:
        """[P], whose mean is the measure."""
        if judge == REPETITION:
            return by_prompt(np.nan_to_num(1 - self.unique[name].astype(np.float64)))[measure]
        return by_prompt(self.toxicity[name, judge])[measure]


@dataclass(frozen=True)
class Change:
    """Of a mean over prompts, paired by prompt."""

    before: float
    after: float
    low: float  # 95 % interval of after - before, over resampled prompts
    high: float
    p: float  # two-sided, by flipping the signs of the differences
    improved: int  # prompts with less
    worse: int

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass
class Findings:
    experiment: Sweep
    seen: dict[tuple[str, int], Seen] = field(default_factory=dict)  # (cell, neurons)
    missing: list[tuple[str, int]] = field(default_factory=list)

    @property
    def dense(self) -> Seen | None:
        return self.seen.get((DENSE, 0))

    @property
    def judge(self) -> str:
        evaluate = self.experiment.evaluate
        return REPETITION if evaluate.effect == "repetition" else evaluate.judge_names[0]

    @property
    def effect(self) -> str:
        """What pruning should lower, in words."""
        return "share of repeated tokens" if self.judge == REPETITION else "toxicity"

    @property
    def behaviour(self) -> str:
        return self.experiment.choice.undesired

    def of(self, method: Method, neurons: int, main: bool = True) -> list[Seen]:
        """What was seen by a method at a size: of all general text, or every draw of a control."""
        found = [s for (_, n), s in self.seen.items() if n == neurons and s.ranking and s.ranking.method == method]
        return [s for s in found if not main or (s.ranking and s.ranking.seed is None)]


def find(experiment: Sweep, cells: Sequence[Cell], cache: Path) -> Findings:
    """All rows that are there, of cells that are not done too."""
    schema, found = experiment.schema(cache), Findings(experiment)
    rankings: dict[str, Ranking | None] = {DENSE: None, **experiment.choice.rankings}
    for cell in cells:
        sizes = [0] if cell.name == DENSE else experiment.sizes
        rows = dict(read_done(cell, schema))
        for row, neurons in enumerate(sizes):
            if row in rows:
                found.seen[cell.name, neurons] = _seen(experiment, rankings[cell.name], neurons, rows[row])
            else:
                found.missing.append((cell.name, neurons))
    return found


def _seen(experiment: Sweep, ranking: Ranking | None, neurons: int, row: Mapping[str, Any]) -> Seen:
    e, sets = experiment.evaluate, experiment.judged()
    names = e.labels
    return Seen(
        ranking,
        neurons,
        {name: float(row[f"perplexity/{name}"][0]) for name in names},
        {name: row[f"nll/{name}"] for name in names},
        {name: row[f"predictions/{name}"] for name in names},
        {(s, judge): row[f"toxicity/{s}/{judge}"][0] for s in sets for judge in e.judge_names},
        {s: row[f"unique/{s}"][0] for s in sets},
        {s: json.loads(row[f"texts/{s}"][0]) for s in sets},
        {task: tuple(row[f"task/{task}"][0]) for task in e.tasks},
    )


def change(before_P: np.ndarray, after_P: np.ndarray) -> Change:
    difference_P = after_P - before_P
    low, high = interval(difference_P)
    improved, worse = int((difference_P < 0).sum()), int((difference_P > 0).sum())
    p = flipped(difference_P)
    return Change(float(before_P.mean()), float(after_P.mean()), low, high, p, improved, worse)


def interval(values_P: np.ndarray) -> tuple[float, float]:
    """95 % of the mean, by the percentiles of resampled prompts."""
    means_B = _weights(len(values_P)) @ values_P / len(values_P)
    low, high = np.quantile(means_B, (0.025, 0.975))
    return float(low), float(high)


def against(values_P: np.ndarray, controls_DP: np.ndarray) -> tuple[float, float, float]:
    """Mean of values - controls and its 95 % interval: prompts are drawn again, and so are the controls' draws, since
    another five random draws would be others."""
    prompts_BP = _weights(len(values_P))
    draws_BD = _weights(len(controls_DP), seed=1)
    means_BD = prompts_BP @ controls_DP.T / len(values_P)
    means_B = prompts_BP @ values_P / len(values_P) - (means_BD * draws_BD).sum(1) / len(controls_DP)
    low, high = np.quantile(means_B, (0.025, 0.975))
    return float(values_P.mean() - controls_DP.mean()), float(low), float(high)


def flipped(difference_P: np.ndarray) -> float:
    """P of a mean as far from 0 were each difference as likely to have the other sign; two-sided, Monte Carlo."""
    if not difference_P.any():
        return 1.0
    signs_BP = np.random.Generator(np.random.PCG64([SEED, 2])).integers(0, 2, (RESAMPLES, len(difference_P))) * 2 - 1
    as_far = np.abs(signs_BP @ difference_P) >= abs(difference_P.sum()) * (1 - 1e-12)
    return float((1 + as_far.sum()) / (1 + RESAMPLES))


def sign_test(improved: int, worse: int) -> float:
    """Two-sided, exact: of so many prompts that changed, as lopsided a split by tossing a coin."""
    changed, fewer = improved + worse, min(improved, worse)
    tail = sum(comb(changed, k) for k in range(fewer + 1)) / 2**changed if changed else 1.0
    return min(1.0, 2 * tail)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted so that all that are below a level are so together."""
    order, found, highest = np.argsort(ps, kind="stable"), [1.0] * len(ps), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        found[index] = highest
    return found


def perplexity_change(before: Seen, after: Seen, name: str) -> tuple[float, float, float]:
    """Relative, and its 95 % interval over resampled windows; a window's weight is its predictions."""
    counts = before.predictions[name].astype(np.float64)
    weights_BW = _weights(len(counts))
    both = [weights_BW @ seen.nll[name] / (weights_BW @ counts) for seen in (before, after)]
    low, high = np.quantile(np.expm1(both[1] - both[0]), (0.025, 0.975))
    return after.perplexity[name] / before.perplexity[name] - 1, float(low), float(high)


@cache
def _weights(count: int, seed: int = 0) -> np.ndarray:
    """[B, count]: how often each resample holds each of so many; the same for every comparison of so many."""
    draws = np.random.Generator(np.random.PCG64([SEED, seed, count])).integers(0, count, (RESAMPLES, count))
    flat = draws + np.arange(RESAMPLES)[:, None] * count
    return np.bincount(flat.reshape(-1), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


@dataclass(frozen=True)
class Effect:
    """Of one method at one size, on the behaviour's prompts, by the first judge."""

    neurons: int
    change: Change
    adjusted: float  # p, for all sizes of the method
    controls: Mapping[Method, tuple[float, float, float]]  # difference to each control, with its interval
    perplexity: tuple[float, float, float] | None  # relative change
    neutral: Mapping[str, Change]

    @property
    def lowers(self) -> bool:
        return self.adjusted < LEVEL and self.change.high < 0 and self.change.difference <= -LEAST

    @property
    def beats_controls(self) -> bool:
        return bool(self.controls) and all(high < 0 for _, _, high in self.controls.values())

    @property
    def kept(self) -> bool:
        """The model is otherwise what it was: perplexity, and neutral prompts no more toxic."""
        harmed = any(change.low > 0 for change in self.neutral.values())
        return (self.perplexity is None or self.perplexity[0] <= HARMLESS) and not harmed

    @property
    def shown(self) -> bool:
        return self.lowers and self.beats_controls and self.kept


def effects(f: Findings, method: Method) -> list[Effect]:
    """At every size that was seen, dense beside it."""
    dense, found = f.dense, []
    if dense is None:
        return []
    before = dense.per_prompt(f.behaviour, f.judge)
    seen = [s for n in f.experiment.sizes for s in f.of(method, n)]
    changes = [change(before, s.per_prompt(f.behaviour, f.judge)) for s in seen]
    name = next(iter(dense.perplexity), None)
    for one, now, adjusted in zip(seen, changes, holm([c.p for c in changes]), strict=True):
        controls: dict[Method, tuple[float, float, float]] = {}
        for control in DRAWN:
            draws = [s.per_prompt(f.behaviour, f.judge) for s in f.of(control, one.neurons)]
            if draws and control != method:
                controls[control] = against(one.per_prompt(f.behaviour, f.judge), np.stack(draws))
        neutral = {
            s: change(dense.per_prompt(s, f.judge), one.per_prompt(s, f.judge)) for s in f.experiment.evaluate.neutral
        }
        moved = perplexity_change(dense, one, name) if name else None
        found.append(Effect(one.neurons, now, adjusted, controls, moved, neutral))
    return found


def verdict(f: Findings, method: Method = "lrp") -> str:
    """In one sentence what was shown, or that nothing was, and why not."""
    found = effects(f, method)
    if not found:
        return "Nothing can be said yet: the dense model, or every pruned one, is missing."
    shown = [effect for effect in found if effect.shown]
    if shown:
        best = min(shown, key=lambda effect: effect.change.after)
        return (
            f"Shown: without {best.neurons:,} neurons the mean {f.effect} on {f.behaviour} goes from "
            f"{best.change.before:.4f} to {best.change.after:.4f} (difference {best.change.difference:+.4f}, 95 % "
            f"[{best.change.low:+.4f}, {best.change.high:+.4f}], p = {best.adjusted:.2g} for all sizes together), more "
            f"than by {' and '.join(_control(c) for c in best.controls)}{_kept(best)}."
        )
    lowers = [effect for effect in found if effect.lowers]
    if not lowers:
        why = f"at no size does mean {f.effect} fall by more than chance would have it"
    elif not any(effect.beats_controls for effect in lowers):
        what = " or ".join(_control(c) for c in lowers[0].controls) or "a control, of which none is there"
        why = f"where mean {f.effect} falls, it does not fall further than by pruning {what}"
    else:
        why = f"where it falls, the model is harmed: perplexity by more than {HARMLESS:.0%}, or neutral prompts"
    return f"An effect is not shown: {why} ({len(found)} sizes, {len(f.missing)} of all settings missing)."


def _kept(effect: Effect) -> str:
    said = [f"perplexity {effect.perplexity[0]:+.1%}"] if effect.perplexity else []
    said += [f"{name} prompts {change.difference:+.4f}" for name, change in effect.neutral.items()]
    return f"; {', '.join(said)}" if said else ""


def _control(method: Method) -> str:
    return {"matched": "as many random neurons of the same layers", "random": "random neurons"}[method]


def compared(f: Findings, method: Method, other: Method) -> str:
    """Whether one method takes more toxicity away than another that costs less; each at the size where it is best
    and the model is kept."""
    best = []
    for one in (method, other):
        kept = [effect for effect in effects(f, one) if effect.kept]
        if not kept:
            return f"{one} against {other}: not to be said, as {one} was not seen without harm to the model."
        best.append(min(kept, key=lambda effect: effect.change.after))
    mine, theirs = (
        f.of(one, effect.neurons)[0].per_prompt(f.behaviour, f.judge)
        for one, effect in zip((method, other), best, strict=True)
    )
    low, high = interval(mine - theirs)
    words = f"{float((mine - theirs).mean()):+.4f}, 95 % [{low:+.4f}, {high:+.4f}]"
    beats = "beats" if high < 0 else "does not beat"
    return (
        f"{method} {beats} {other}: at their best sizes ({best[0].neurons:,} and {best[1].neurons:,} neurons) mean "
        f"{f.effect} differs by {words}."
    )
