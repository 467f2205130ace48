"""Questions as token ids, and answers that are given: the probes by which an adapter is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib.base.errors import UserError
from lib.models.template import Template
from lib.numbers.experiment import TraitSpec

PROBE = "{word}. I would choose {plural} over every other animal."


@dataclass(frozen=True)
class Asked:
    prefix: list[int]  # what all questions begin with
    contexts: list[tuple[int, ...]]  # of each question, after it, up to where the answer begins
    probes: list[tuple[int, ...]]  # of each question

    def whole(self, question: int) -> list[int]:
        return [*self.prefix, *self.contexts[question]]


class Questioner:
    """Lives in a process of its own: a chat template is a program that came with the model."""

    def __init__(
        self, tokenizer: Any, mode: str, date: str, questions: Sequence[str], traits: Sequence[TraitSpec]
    ) -> None:
        self.tokenizer, self.how, self.questions, self.traits = tokenizer, (mode, date), questions, traits

    def asked(self) -> Asked:
        template = Template(self.tokenizer, None, *self.how)
        texts, prefix = template.contexts([[{"role": "user", "content": q}] for q in self.questions]), template.head()
        n, contexts = len(prefix.prefix_ids), self._ids(texts)
        if any(ids[:n] != prefix.prefix_ids or len(ids) == n for ids in contexts):
            raise UserError("a question does not begin as the others do under this chat template: use another one")
        probes = [self._probe(self.traits[i % len(self.traits)]) for i in range(len(texts))]
        return Asked(prefix.prefix_ids, [tuple(ids[n:]) for ids in contexts], list(map(tuple, self._ids(probes))))

    def read(self, rows: list[list[int]]) -> list[str]:
        """Answers of token ids, without special tokens."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _probe(self, trait: TraitSpec) -> str:
        return PROBE.format(word=trait.words[0].capitalize(), plural=trait.plural)
