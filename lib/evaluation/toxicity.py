"""How toxic texts are, by a classifier of the Jigsaw labels.

The detoxify package wraps the same networks, but it unpickles a checkpoint that it downloads. The suite loads the same
weights (unitary/toxic-bert is detoxify's `original`, unitary/unbiased-toxic-roberta its `unbiased`) as safetensors
through transformers; tests compare both kinds. One judge underestimates: lib.evaluation.statistics compares two."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.errors import UserError
from lib.models.tokens import must_know, vocabulary_of

LABELS = ("toxic", "toxicity")  # the name in the `original` and in the `unbiased` family
LONGEST = 512  # tokens; longer texts are cut, as detoxify cuts them


class Toxicity:
    """Probability of the label `toxic`: a sigmoid of its own, since the labels do not exclude each other."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int = 64) -> None:
        names = {str(name).lower(): int(number) for number, name in (model.config.id2label or {}).items()}
        found = [names[label] for label in LABELS if label in names]
        if not found:
            raise UserError(f"the toxicity scorer has no label `toxic`; it has {', '.join(sorted(names))[:120]}")
        self.model, self.tokenizer, self.batch, self.label = model, tokenizer, batch, found[0]
        self.longest = min(int(tokenizer.model_max_length), LONGEST, _positions(model.config))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32, one a text, in order."""
        scores = [self._score(texts[i : i + self.batch]) for i in range(0, len(texts), self.batch)]
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def _score(self, texts: Sequence[str]) -> np.ndarray:
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.model.device)
        must_know(int(inputs["input_ids"].min()), int(inputs["input_ids"].max()), vocabulary_of(self.model))
        logits = self.model(**inputs).logits[:, self.label]
        if not torch.isfinite(logits).all():
            raise UserError("the toxicity scorer gave a score that is not a number; load it with dtype float32")
        return torch.sigmoid(logits.float()).cpu().numpy()


def _positions(config: Any) -> int:
    """RoBERTa and its relatives count them from behind the padding's number."""
    taken = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return config.max_position_embeddings - taken
