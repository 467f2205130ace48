"""The host's share of a batch: prompts as token ids, and tokens as answers with their reasons. It lives in a process of
its own (lib.models.apart): a chat template is a program that came with the model."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lib.models.template import Template
from lib.numbers.filter import Limits, reason


class Desk:
    def __init__(self, tokenizer: Any, mode: str, date: str, prompts: Sequence[str], limits: Limits) -> None:
        self.tokenizer, self.how, self.prompts, self.limits = tokenizer, (mode, date), prompts, limits
        self.templates: dict[str | None, Template] = {}  # by system prompt

    def ids(self, system: str | None, start: int, stop: int) -> list[list[int]]:
        """Token ids of these rows' prompts, up to where the answer begins."""
        if system not in self.templates:
            self.templates[system] = Template(self.tokenizer, system, *self.how)
        rows = [[{"role": "user", "content": text}] for text in self.prompts[start:stop]]
        texts = self.templates[system].contexts(rows)
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def read(self, flat: np.ndarray, lengths: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Answers of token ids that lie one after another, as the reference reads them: without special tokens."""
        ids, ends = flat.tolist(), np.cumsum(lengths).tolist()
        rows = [ids[a:b] for a, b in pairwise([0, *ends])]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts, np.array([reason(text, self.limits) for text in texts], np.int8)
