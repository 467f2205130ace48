"""Which neurons to prune: values of every neuron, of which the lowest are pruned first, and a choice of so many.

Contrasts of two sets' mean scores: general text, which the model should keep, and what is undesired. A choice is
indices over all neurons, as the columns of attribution have them, first to prune first; ties go by index, and what is
NaN or infinite is never chosen. Suffixes: N neurons, S samples, J outputs, I inputs."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from lib.attribution.stability import select
from lib.attribution.summary import Sampled
from lib.base.errors import UserError
from lib.report.stats import Z95

Contrast = Literal["difference", "ratio", "set_difference", "undesired"]
Scope = Literal["global", "layer"]
FLOOR = 0.01  # of the mean size of general scores: below it a neuron's counts as nothing
TOPS = (0.05, 0.05)  # shares of set_difference: of general, of undesired
BLOCK_VALUES = 1 << 22  # of a weight, squared at once


class Place(Protocol):
    """A layer's place among all neurons: attribution's Part and Layer."""

    @property
    def name(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def outputs(self) -> int: ...


def contrast(
    kind: Contrast,
    general_N: np.ndarray,
    undesired_N: np.ndarray,
    places: Sequence[Place],
    scope: Scope = "global",
    tops: tuple[float, float] = TOPS,
) -> np.ndarray:
    """Values of every neuron, the lowest first to prune.

    difference      general - undesired: the paper's
    ratio           -undesired / general of selective pruning, which has importances that are never negative. Relevance
                    may be: a negative one counts as none, so that two negative ones make no important neuron.
                    General is taken as at least FLOOR times the mean size of all general scores (of the layer, where
                    the scope is one), so that neurons that do nothing at all do not come first
    set_difference  -undesired of neurons among the highest tops[1] of undesired and not among the highest tops[0] of
                    general; the others are never chosen
    undesired       -undesired: what general text loses is not looked at"""
    if kind not in get_args(Contrast):
        raise UserError(f"no contrast is called '{kind}'; there are: {', '.join(get_args(Contrast))}")
    general_N, undesired_N = np.asarray(general_N, np.float64), np.asarray(undesired_N, np.float64)
    if general_N.shape != undesired_N.shape:
        raise UserError(
            f"general text has {len(general_N)} neurons' scores and the other set {len(undesired_N)}: "
            "attribute both with the same layers"
        )
    if kind == "difference":
        with np.errstate(invalid="ignore"):  # of two infinities
            return general_N - undesired_N
    if kind == "undesired":
        return -undesired_N
    values_N = np.full(len(general_N), np.inf)
    for block in _blocks(places, scope, len(values_N)):
        both = general_N[block], undesired_N[block]
        values_N[block] = _ratio(*both) if kind == "ratio" else _set_difference(*both, tops)
    return values_N


def _ratio(general_N: np.ndarray, undesired_N: np.ndarray) -> np.ndarray:
    sizes = np.abs(general_N[np.isfinite(general_N)])
    floor = FLOOR * sizes.mean() if sizes.any() else 1.0
    with np.errstate(invalid="ignore"):
        values_N = -np.maximum(undesired_N, 0) / np.maximum(general_N, floor)
    return np.where(np.isfinite(general_N), values_N, np.inf)


def _set_difference(general_N: np.ndarray, undesired_N: np.ndarray, tops: tuple[float, float]) -> np.ndarray:
    inside, values_N = np.zeros(len(general_N), bool), np.full(len(general_N), np.inf)
    for scores_N, share, belongs in ((undesired_N, tops[1], True), (general_N, tops[0], False)):
        if not 0 <= share <= 1:
            raise UserError(f"the highest {share:g} of all neurons: a share lies between 0 and 1")
        count = min(int(share * len(scores_N)), int(np.isfinite(scores_N).sum()))
        if count:
            inside[select(scores_N, count, lowest=False)] = belongs
    values_N[inside] = -undesired_N[inside]
    values_N[~np.isfinite(general_N)] = np.inf
    return values_N


def choose(values_N: np.ndarray, count: int, places: Sequence[Place], scope: Scope = "global") -> np.ndarray:
    """The `count` lowest of all neurons, or of each layer: then every layer's first, every layer's second, and so on.
    So the choice of fewer is always the beginning of the choice of more."""
    if scope not in get_args(Scope):
        raise UserError(f"no scope is called '{scope}'; there are: {', '.join(get_args(Scope))}")
    picks = []
    for number, block in enumerate(_blocks(places, scope, len(values_N))):
        finite = int(np.isfinite(values_N[block]).sum())
        if not 0 <= count <= finite:
            where = f" of {places[number].name}" if scope == "layer" else ""
            raise UserError(f"{count} neurons{where} cannot be chosen: {finite} have a value; choose 0 to {finite}")
        picks.append(block.start + select(values_N[block], count) if count else np.empty(0, np.int64))
    return np.stack(picks, 1).reshape(-1)


def by_layer(chosen: np.ndarray, places: Sequence[Place]) -> dict[str, np.ndarray]:
    """Layer -> its chosen neurons by their index in the layer, ascending; layers without one are left out."""
    found = {p.name: np.sort(chosen[(chosen >= p.first) & (chosen < p.first + p.outputs)] - p.first) for p in places}
    return {name: indices for name, indices in found.items() if len(indices)}


def random_choice(count: int, places: Sequence[Place], seed: int) -> np.ndarray:
    """A control: any of all neurons, without replacement. Fewer are the beginning of more of the same seed."""
    neurons = _neurons(places)
    if not 0 <= count <= neurons:
        raise UserError(f"{count} random neurons cannot be chosen: there are {neurons}")
    return _random(seed).permutation(neurons)[:count]


def matched_choice(chosen: np.ndarray, places: Sequence[Place], seed: int) -> np.ndarray:
    """The fair control: for each neuron of a choice, in its order, a random one of the same layer that is not in it."""
    out, random = np.empty(len(chosen), np.int64), _random(seed)
    for p in places:
        mine = np.flatnonzero((chosen >= p.first) & (chosen < p.first + p.outputs))
        others = np.setdiff1d(np.arange(p.first, p.first + p.outputs), chosen[mine])
        if len(others) < len(mine):
            raise UserError(
                f"{len(mine)} of {p.outputs} neurons of {p.name} are chosen: too few are left for as many others; "
                "choose fewer, or compare with random neurons of all layers"
            )
        out[mine] = random.permutation(others)[: len(mine)]
    return out


def row_norms(weights: Iterable[np.ndarray]) -> np.ndarray:
    """Magnitude, a control: the Euclidean norm of each neuron's own row of weights [J, I], of one layer after another.
    Of an MLP's neuron that is the scored layer's row alone, without the gate's and without the column that it feeds."""
    found = []
    for weight_JI in weights:
        rows = max(BLOCK_VALUES // weight_JI.shape[1], 1)
        parts = (weight_JI[at : at + rows].astype(np.float64) for at in range(0, len(weight_JI), rows))
        found += [np.sqrt(np.square(part).sum(1)) for part in parts]
    return np.concatenate(found)


def difference_interval(general: Sampled, undesired: Sampled, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of each chosen neuron's 95 % interval of general - undesired, by the normal approximation: the samples of
    both are independent, so the variances of the means add up. NaN where a set has a single sample."""
    middle = general.mean_N[chosen] - undesired.mean_N[chosen]
    half = Z95 * np.sqrt(general.variance_N[chosen] + undesired.variance_N[chosen])
    return middle - half, middle + half


def agreement(chosen: np.ndarray, choices: Sequence[np.ndarray]) -> np.ndarray:
    """For each chosen neuron, how many of the choices that single seeds make hold it."""
    return np.stack([np.isin(chosen, choice) for choice in choices]).sum(0)


def _neurons(places: Sequence[Place]) -> int:
    return max((p.first + p.outputs for p in places), default=0)


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _blocks(places: Sequence[Place], scope: Scope, neurons: int) -> list[slice]:
    """What is ranked together."""
    if neurons != _neurons(places):
        raise UserError(f"{neurons} neurons have a value and the layers have {_neurons(places)}: they are not of one")
    return [slice(p.first, p.first + p.outputs) for p in places] if scope == "layer" else [slice(0, neurons)]
