"""A set's scores in few numbers: means over samples, what each layer adds up to, the neurons that stand out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.attribution.stability import mean_over_samples, select, variance_of_mean
from lib.report.stats import Z95

TOP = 10  # neurons named in the table


@dataclass(frozen=True)
class Layer:
    """A scored linear layer and its place among all neurons."""

    name: str  # layers.3.mlp.up_proj
    first: int
    outputs: int

    @property
    def block(self) -> slice:
        return slice(self.first, self.first + self.outputs)


@dataclass(frozen=True)
class Sampled:
    """Means of every neuron over samples, and the variances of these means (NaN from a single sample)."""

    mean_N: np.ndarray
    variance_N: np.ndarray
    samples: int


@dataclass
class Summary:
    """Of one set. `totals`, `halves`: what each layer's scores add up to, mean over samples, and half the width of its
    95 % interval (NaN where samples were added up before they were stored)."""

    name: str
    samples: int
    tokens: int
    logit: float  # mean of what is explained
    nonfinite: int
    totals: dict[str, np.ndarray] = field(default_factory=dict)
    halves: dict[str, np.ndarray] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)  # of every neuron, float64; none at weight level
    variances: dict[str, np.ndarray] = field(default_factory=dict)  # of these means, where samples were kept apart

    def sampled(self, kind: str) -> Sampled:
        return Sampled(self.means[kind], self.variances[kind], self.samples)

    def add(self, kind: str, scores_SN: np.ndarray, layers: Sequence[Layer]) -> None:
        """Scores of single samples."""
        self.means[kind] = mean_over_samples(scores_SN)
        self.variances[kind] = variance_of_mean(scores_SN)
        sums = np.stack([scores_SN[:, layer.block].sum(1, dtype=np.float64) for layer in layers])
        self.totals[kind] = sums.mean(1)
        samples = scores_SN.shape[0]
        half = sums.std(1, ddof=1) * Z95 / math.sqrt(samples) if samples > 1 else np.full(len(layers), np.nan)
        self.halves[kind] = half


def together(sets: Sequence[Sampled]) -> Sampled:
    """Sets of other samples, each with the same weight, as one."""
    return Sampled(
        np.mean([one.mean_N for one in sets], 0),
        np.sum([one.variance_N for one in sets], 0) / len(sets) ** 2,
        sum(one.samples for one in sets),
    )


def name_of(neuron: int, layers: Sequence[Layer]) -> str:
    layer = next(layer for layer in layers if layer.first <= neuron < layer.first + layer.outputs)
    return f"{layer.name}[{neuron - layer.first}]"


def top_lines(values_N: np.ndarray, layers: Sequence[Layer], lowest: bool, count: int = TOP) -> list[str]:
    """The first neurons of a selection, with their values."""
    count = min(count, int(np.isfinite(values_N).sum()))
    if not count:
        return ["none is finite"]
    return [f"{name_of(int(n), layers)} {values_N[n]:+.4g}" for n in select(values_N, count, lowest)]


def overview(summaries: Mapping[str, Summary | None]) -> str:
    """Sets in the order given, one a line."""
    kinds = [kind for kind in _kinds(summaries) if kind != "wanda"]
    width = max([len("set"), *map(len, summaries)])
    head = "".join(f"{'sum ' + kind:>14s}" for kind in kinds)
    lines = [f"{'set':{width}s}  samples     tokens  mean logit{head}  not finite"]
    for name, s in summaries.items():
        if s is None:
            lines.append(f"{name:{width}s}        -          -  missing")
            continue
        sums = "".join(f"{s.totals[kind].sum():+14.6g}" for kind in kinds)
        logit = "-" if math.isnan(s.logit) else f"{s.logit:.4f}"
        lines.append(f"{name:{width}s}  {s.samples:7,}  {s.tokens:9,}  {logit:>10s}{sums}  {s.nonfinite:10,}")
    return "\n".join(lines)


def table(summaries: Mapping[str, Summary | None], layers: Sequence[Layer], explained: str) -> str:
    """The overview, the layers of each set, and the neurons that stand out."""
    lines = [overview(summaries), "", f"Explained: {explained}."]
    lines += ["A set's sum is over all scored neurons or weights, mean over samples."]
    for kind in _kinds(summaries):
        lines += ["", *_layer_table(kind, summaries, layers)]
    for name, s in summaries.items():
        for kind, values in (s.means if s else {}).items():
            what = kind if kind == "wanda" else f"mean {kind}"
            lines += ["", f"{name}: highest {what}", *(f"  {line}" for line in top_lines(values, layers, False))]
    return "\n".join(lines)


def _kinds(summaries: Mapping[str, Summary | None]) -> list[str]:
    return list(dict.fromkeys(kind for s in summaries.values() if s for kind in s.totals))


def _layer_table(kind: str, summaries: Mapping[str, Summary | None], layers: Sequence[Layer]) -> list[str]:
    """A layer a line, a set a column."""
    present = {name: s for name, s in summaries.items() if s and kind in s.totals}
    width = max([len(kind), *(len(layer.name) for layer in layers)])
    cell = max([14, *(len(name) + 2 for name in present)])
    head = f"{kind:{width}s}" + "".join(f"{name:>{cell}s}" for name in present)
    rows = [
        f"{layer.name:{width}s}" + "".join(f"{s.totals[kind][i]:+{cell}.6g}" for s in present.values())
        for i, layer in enumerate(layers)
    ]
    return [head, *rows]
