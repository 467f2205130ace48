"""Every ranking of a selection, from the means of its attributions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lib.attribution.experiment import Attribution
from lib.attribution.stability import mean_over_samples, variance_of_mean
from lib.attribution.summary import Sampled, together
from lib.attribution.weights import weights_of
from lib.inputs.records import model_input
from lib.pruning import choose
from lib.pruning.experiment import Selection, after
from lib.pruning.methods import COLUMNS, CONTRASTED, SOURCES, Method, Ranking
from lib.run.command import Job
from lib.run.task import run_rows
from lib.store import Cell, read_cell


def compute(this: Job) -> int:
    experiment = this.of(Selection)
    seen: dict[tuple[str, str], Sampled] = {}  # for all cells of the task: they read the same sets

    def load(cell: Cell) -> tuple["RankingKernel", dict[str, Any]]:
        return RankingKernel(experiment, this.site.cache, cell, seen), {"device": "cpu"}

    return run_rows(this, load)


@dataclass(frozen=True)
class Ranked:
    """Neurons by their place among all, best first, and what they were ranked by."""

    order: np.ndarray
    values_N: np.ndarray  # of all neurons
    general: Sampled | None = None
    undesired: Sampled | None = None


class RankingKernel:
    def __init__(self, experiment: Selection, cache: Path, cell: Cell, seen: dict[tuple[str, str], Sampled]) -> None:
        self.experiment, self.cache, self.cell, self.seen = experiment, cache, cell, seen
        self.parts, self.rows = experiment.layout(cache), experiment.rows(cache)
        self.model = model_input(cache, experiment.base.model.id, experiment.base.model.revision)

    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def compute(self, prepared: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        ranking, rows = self.experiment.rankings[self.cell.name], slice(*prepared)
        ranked = self.ranked(ranking)
        order = ranked.order[rows]
        firsts = np.array([part.first for part in self.parts])
        layer = np.searchsorted(firsts, order, side="right") - 1
        columns = {"layer": layer, "neuron": order - firsts[layer], "value": ranked.values_N[order]}
        columns |= dict(zip(("low", "high"), self._interval(ranked, order), strict=True))
        for name, sampled in (("general", ranked.general), ("undesired", ranked.undesired)):
            columns[name] = sampled.mean_N[order] if sampled else np.full(len(order), np.nan)
        return {**columns, "ranks": self._ranks(ranking, order)}, {}

    def ranked(self, ranking: Ranking) -> Ranked:
        """By one method, from all general text or one seed's."""
        method, neurons = ranking.method, sum(part.outputs for part in self.parts)
        if method == "random":
            return _drawn(choose.random_choice(self.rows, self.parts, ranking.draw or 0), neurons)
        if method == "matched":
            of = self.ranked(Ranking("lrp"))
            return _drawn(choose.matched_choice(of.order, self.parts, ranking.draw or 0), neurons)
        if method == "magnitude":
            values = choose.row_norms(weight.float().numpy() for weight in weights_of(self.model, self.parts))
            return Ranked(self._first(values), values)
        undesired = self.sampled(method, self.experiment.undesired)
        if method == "undesired":
            values = choose.contrast("undesired", undesired.mean_N, undesired.mean_N, self.parts)
            return Ranked(self._first(values), values, None, undesired)
        seeds = self.experiment.base.data.general.seeds if ranking.seed is None else [ranking.seed]
        general = together([self.sampled(method, f"general-{seed}") for seed in seeds])
        e = self.experiment
        values = choose.contrast(e.contrast, general.mean_N, undesired.mean_N, self.parts, e.scope)
        return Ranked(self._first(values), values, general, undesired)

    def _first(self, values_N: np.ndarray) -> np.ndarray:
        return choose.choose(values_N, self.experiment.neurons, self.parts, self.experiment.scope)

    def _interval(self, ranked: Ranked, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a difference of means; of nothing else, as nothing else is told as simply."""
        if ranked.general is None or ranked.undesired is None or self.experiment.contrast != "difference":
            return np.full(len(order), np.nan), np.full(len(order), np.nan)
        return choose.difference_interval(ranked.general, ranked.undesired, order)

    def _ranks(self, ranking: Ranking, order: np.ndarray) -> np.ndarray:
        """[rows, seeds]: where a neuron stands by each seed's general text alone; -1 beyond the selection's end."""
        seeds = self.experiment.base.data.general.seeds
        found = np.full((len(order), len(seeds)), -1, np.int32)
        for column, seed in enumerate(seeds if ranking.method in CONTRASTED else []):
            own = self.ranked(replace(ranking, seed=seed)).order
            rank = {int(neuron): at for at, neuron in enumerate(own)}
            found[:, column] = [rank.get(int(neuron), -1) for neuron in order]
        return found

    def sampled(self, method: Method, name: str) -> Sampled:
        """Means of every neuron over a set's samples."""
        cell = next(parent for parent in self.cell.parents if parent.name == name and self._is_of(parent, method))
        key = cell.digest, COLUMNS[method]
        if key not in self.seen:
            self.seen[key] = self._read(method, cell)
        return self.seen[key]

    def _is_of(self, parent: Cell, method: Method) -> bool:
        return parent.folder.name == self.experiment.sources[SOURCES[method]].experiment.label

    def _read(self, method: Method, cell: Cell) -> Sampled:
        source = self.experiment.sources[SOURCES[method]].experiment
        assert isinstance(source, Attribution)
        schema, column = source.schema(self.cache), COLUMNS[method]
        found = read_cell(cell, schema, ["tokens", column])
        if method == "activation":  # root of the mean square over a sample's tokens
            places = {part.name: part.first_input for part in source.layout(self.cache)}
            firsts = [(places[after(part.name)], part.outputs) for part in self.parts]
            squares = np.concatenate([found[column][:, at : at + count] for at, count in firsts], 1)
            values = np.sqrt(squares / found["tokens"][:, None])
        elif method == "wanda":
            return self._wanda(found)
        else:
            values = found[column]
        return Sampled(mean_over_samples(values), variance_of_mean(values), len(values))

    def _wanda(self, found: Mapping[str, np.ndarray]) -> Sampled:
        """|W| times the inputs' norms over all tokens of a set, added up over a neuron's inputs."""
        import torch

        from lib.attribution.wanda import neuron_scores, norms

        total, tokens, scores = found["sumsq"].sum(0, dtype=np.float64), int(found["tokens"].sum()), []
        for part, weight in zip(self.parts, weights_of(self.model, self.parts), strict=True):
            mine = torch.from_numpy(total[part.first_input : part.first_input + part.inputs])
            scores.append(neuron_scores(weight, norms(mine, tokens, len(found["tokens"]), "rms")).double().numpy())
        mean = np.concatenate(scores)
        return Sampled(mean, np.full(len(mean), np.nan), len(found["tokens"]))


def _drawn(order: np.ndarray, neurons: int) -> Ranked:
    """A random order has no values but its own."""
    values = np.full(neurons, np.nan)
    values[order] = np.arange(len(order))
    return Ranked(order, values)
