"""A loaded model that is pruned and looked at, again and again: the scorer's decoder for perplexity, where it computes
the family, transformers' model on the same weights for completions; and the judges."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.errors import UserError
from lib.checkpoint.families import Family, family_in
from lib.evaluation.completions import Completing, Completion, complete
from lib.evaluation.log_probs import by_decoder, by_model
from lib.evaluation.perplexity import Window
from lib.evaluation.tasks import Tasks
from lib.evaluation.toxicity import Toxicity
from lib.inputs.specs import ModelSpec
from lib.inputs.tokenizer import load_tokenizer
from lib.inputs.verified import checked_model
from lib.models.classifier import load_classifier
from lib.models.load import device_name, load_decoder, load_model, visible_devices
from lib.models.scorer import Scorer
from lib.models.shared import model_of
from lib.pruning.looks import TextsSpec
from lib.pruning.neurons import Pruner
from lib.pruning.sweep import CompletionsSpec

HEAD_ROWS = 1024  # states whose logits exist at once


@dataclass(frozen=True)
class Subject:
    cache: Path
    model: Any
    scorer: Scorer | None
    weights: Any  # what is pruned: the decoder's, which the model shares, or the model
    family: Family
    pruner: Pruner
    tokenizer: Any
    judges: list[Toxicity]
    asked: Tasks | None
    task_names: Sequence[str]
    device: str

    @contextmanager
    def without(self, neurons: Mapping[str, Sequence[int]]) -> Iterator[None]:
        with self.pruner.applied(neurons):
            yield

    def log_probs(self, windows: Sequence[Window]) -> list[np.ndarray]:
        if self.scorer is None:
            return by_model(self.model, windows)
        return by_decoder(self.scorer, windows)

    def complete(self, prompts: Sequence[Sequence[int]], how: CompletionsSpec) -> list[list[Completion]]:
        sampling = Completing(how.per_prompt, how.tokens, how.temperature or None, how.seed, how.batch)
        return complete(self.model, self.tokenizer, prompts, sampling, with_prompt=how.with_prompt)

    def judge(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [judge(texts) for judge in self.judges]

    def tasks(self) -> dict[str, np.ndarray]:
        """Of each task its accuracy, or, where it has none, its first figure, and the standard error."""
        found = self.asked(self.model, self.tokenizer) if self.asked else {}
        columns = {}
        for name in self.task_names:
            if name not in found:
                raise UserError(f"task {name} is a group of several ({', '.join(found)}): name these in evaluate.tasks")
            figures = found[name]
            columns[f"task/{name}"] = np.array(figures.get("acc") or next(iter(figures.values())))
        return columns


def load_subject(
    cache: Path, model: ModelSpec, spec: TextsSpec, folder: str, judges: Sequence[ModelSpec] = ()
) -> Subject:
    """On every GPU that is visible; the judges on the first."""
    devices = visible_devices()
    family: Family = family_in(Path(folder), "cannot be pruned here; these can")
    if family.shape:
        decoder = load_decoder(folder, model.dtype, spec.batch_tokens, HEAD_ROWS)
        scorer, loaded, weights = Scorer(decoder, HEAD_ROWS), model_of(decoder, folder), decoder.weights
    else:
        scorer, loaded = None, load_model(folder, model.dtype, "sdpa", devices)
        weights = loaded
    them = []
    for judge in judges:
        path = checked_model(cache, judge.id, judge.revision).path
        them.append(Toxicity(load_classifier(path, judge.dtype, devices[0]), load_tokenizer(path)))
    asked = Tasks(spec.tasks, spec.own_tasks) if spec.tasks else None
    return Subject(
        cache,
        loaded,
        scorer,
        weights,
        family,
        Pruner(weights, family),
        load_tokenizer(folder),
        them,
        asked,
        spec.tasks,
        device_name(devices[0]),
    )
