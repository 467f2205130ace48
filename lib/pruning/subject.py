"""A loaded model that is pruned and looked at, again and again: the scorer's decoder for perplexity, where it computes
the family, transformers' model on the same weights for completions; and the judges."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.checkpoint.families import Family, family_in
from lib.evaluation.completions import Completion, Sampling, complete
from lib.evaluation.log_probs import by_decoder, by_model
from lib.evaluation.perplexity import Window
from lib.evaluation.toxicity import Toxicity
from lib.inputs.tokenizer import load_tokenizer
from lib.inputs.verified import checked_model
from lib.models.classifier import load_classifier
from lib.models.load import device_name, load_decoder, load_model, visible_devices
from lib.models.scorer import Scorer
from lib.models.shared import model_of
from lib.pruning.neurons import Pruner
from lib.pruning.sweep import EvaluateSpec, Sweep

HEAD_ROWS = 1024  # states whose logits exist at once


@dataclass(frozen=True)
class Subject:
    cache: Path
    model: Any
    scorer: Scorer | None
    pruner: Pruner
    tokenizer: Any
    judges: list[Toxicity]
    evaluate: EvaluateSpec
    device: str

    @contextmanager
    def without(self, neurons: Mapping[str, Sequence[int]]) -> Iterator[None]:
        with self.pruner.applied(neurons):
            yield

    def log_probs(self, windows: Sequence[Window]) -> list[np.ndarray]:
        if self.scorer is None:
            return by_model(self.model, windows)
        return by_decoder(self.scorer, windows)

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[list[Completion]]:
        how = self.evaluate.completions
        sampling = Sampling(how.samples, how.tokens, how.temperature or None, how.seed, how.batch)
        return complete(self.model, self.tokenizer, prompts, sampling, with_prompt=how.with_prompt)

    def judge(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [judge(texts) for judge in self.judges]

    def tasks(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        raise NotImplementedError


def load_subject(cache: Path, experiment: Sweep, folder: str) -> Subject:
    e, devices = experiment.evaluate, visible_devices()
    family: Family = family_in(Path(folder), "cannot be pruned here; these can")
    if family.shape:
        decoder = load_decoder(folder, experiment.model.dtype, e.batch_tokens, HEAD_ROWS)
        scorer, model, pruner = Scorer(decoder, HEAD_ROWS), model_of(decoder, folder), Pruner(decoder.weights, family)
    else:
        scorer, model = None, load_model(folder, experiment.model.dtype, "sdpa", devices)
        pruner = Pruner(model, family)
    judges = []
    for spec in e.judges:
        path = checked_model(cache, spec.id, spec.revision).path
        judges.append(Toxicity(load_classifier(path, spec.dtype, devices[0]), load_tokenizer(path)))
    return Subject(cache, model, scorer, pruner, load_tokenizer(folder), judges, e, device_name(devices[0]))
