"""What a model does without the first neurons of a ranking: they are zeroed, it is looked at, they are put back."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lib.evaluation.statistics import unique_share
from lib.inputs.samples import Samples, SamplesInput, read_samples
from lib.inputs.verified import checked_model
from lib.pruning.looks import DENSE
from lib.pruning.sweep import Sweep
from lib.pruning.texts import Texts, stacked
from lib.run.command import Job
from lib.run.task import run_rows
from lib.store import Cell, read_cell


def compute(this: Job) -> int:
    experiment = this.of(Sweep)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell))


def load_kernel(this: Job, experiment: Sweep, cell: Cell) -> tuple["SweepKernel", dict[str, Any]]:
    """The model and what it is shown are loaded once for all cells of a task."""
    from lib.pruning.subject import Subject, load_subject

    path = checked_model(this.site.cache, experiment.model.id, experiment.model.revision).path
    cache, e = this.site.cache, experiment.evaluate
    subject: Subject = this.keep("subject", path, lambda: load_subject(cache, experiment.model, e, path, e.judges))
    shown = this.keep("shown", experiment.label, lambda: Shown(experiment, this.site.cache, path))
    return SweepKernel(experiment, cell, ranked(experiment, this.site.cache, cell), subject, shown), {
        "device": subject.device
    }


def ranked(experiment: Sweep, cache: Path, cell: Cell) -> list[tuple[str, int]]:
    """(layer, neuron) of each rank; none of the dense model."""
    if cell.name == DENSE:
        return []
    choice = experiment.choice
    found = read_cell(cell.parents[0], choice.schema(cache), ["layer", "neuron"])
    names = [part.name for part in choice.layout(cache)]
    return [(names[a], int(b)) for a, b in zip(found["layer"], found["neuron"], strict=True)]


def first(ranking: list[tuple[str, int]], neurons: int, scope: str) -> dict[str, list[int]]:
    """Layer -> its neurons among the first so many, of the model or of each layer."""
    layers = {layer for layer, _ in ranking}
    chosen: dict[str, list[int]] = {}
    for layer, neuron in ranking[: neurons * (1 if scope == "global" else len(layers))]:
        chosen.setdefault(layer, []).append(neuron)
    return chosen


class Shown:
    """What every pruned model is shown: windows of text, and prompts."""

    def __init__(self, experiment: Sweep, cache: Path, model: str) -> None:
        def set_of(name: str) -> SamplesInput:
            return experiment.set_of(cache, name)

        self.texts = Texts(experiment.evaluate, cache, set_of, model)
        judged = experiment.judged()
        self.prompts = {name: prompts_of(experiment, name, read_samples(cache, set_of(name))) for name in judged}


def prompts_of(experiment: Sweep, name: str, samples: Samples) -> list[list[int]]:
    """Token ids: of the behaviour those that were not attributed, unless the very same are meant."""
    if name != experiment.choice.undesired:
        rows = samples.every
    else:
        rows = samples.ids if experiment.evaluate.same_prompts else samples.held_out
    return [ids.tolist() for ids in rows]


class SweepKernel:
    def __init__(
        self, experiment: Sweep, cell: Cell, ranking: list[tuple[str, int]], subject: Any, shown: Shown
    ) -> None:
        self.experiment, self.subject, self.shown = experiment, subject, shown
        self.sizes, self.ranking = [0] if cell.name == DENSE else experiment.sizes, ranking
        self.seconds = {"seconds_perplexity": 0.0, "seconds_completions": 0.0, "seconds_judges": 0.0}

    def prepare(self, start: int, stop: int) -> list[tuple[int, dict[str, list[int]]]]:
        """Layer -> neurons, of each row."""
        scope = self.experiment.choice.scope
        return [(size, first(self.ranking, size, scope)) for size in self.sizes[start:stop]]

    def compute(self, prepared: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        rows = []
        for size, chosen in prepared:
            with self.subject.without(chosen):
                rows.append({"neurons": size, **self._perplexity(), **self._completions(), **self.subject.tasks()})
        columns = stacked(self.experiment.schema(self.subject.cache), rows)
        return columns, {key: round(value, 3) for key, value in self.seconds.items()}

    def _perplexity(self) -> dict[str, Any]:
        with self._timed("seconds_perplexity"):
            return self.shown.texts.look(self.subject.log_probs)

    def _completions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        e = self.experiment.evaluate
        for name, prompts in self.shown.prompts.items():
            with self._timed("seconds_completions"):
                answers = self.subject.complete(prompts, e.completions)
            texts = [[one.text for one in some] for some in answers]
            ids = [[one.ids for one in some] for some in answers]
            found[f"tokens/{name}"] = np.array([[len(one) for one in some] for some in ids], np.int32)
            found[f"unique/{name}"] = np.stack([unique_share(some) for some in ids]).astype(np.float32)
            found[f"texts/{name}"] = json.dumps(texts, ensure_ascii=False)
            with self._timed("seconds_judges"):
                flat = [text if text.strip() else " " for some in texts for text in some]
                for judge, scores in zip(e.judge_names, self.subject.judge(flat), strict=True):
                    found[f"toxicity/{name}/{judge}"] = scores.reshape(len(prompts), -1)
        return found

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - began
