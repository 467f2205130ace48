"""Chat rows as items of a batch; rendered and tokenised in a process apart, since that is code of a model's folder, and
because Python would let it keep the thread that feeds the device waiting (a millisecond of work a row)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lib.base.errors import UserError
from lib.models.apart import Apart
from lib.models.packing import Item
from lib.models.template import Head, Message, Rendered, Template


class Renderer:
    """A Template (one meaning of the system prompt) in a process of its own."""

    def __init__(self, tokenizer: Any, system: str | None, mode: str, date: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: use an Instruct model")
        self._template = Apart(lambda: Template(tokenizer, system, mode, date), "the chat template with its tokenizer")
        head: Head = self._template.ask("head")()
        self.prefix_text, self.prefix_ids, self.end = head.prefix_text, head.prefix_ids, head.end

    def contexts(self, rows: list[list[Message]]) -> list[str]:
        """Each row's text up to where the assistant's answer begins. All begin with the prefix."""
        return self._template.ask("contexts", rows, rows=len(rows))()

    def conversations(self, rows: list[list[Message]]) -> tuple[list[list[int]], list[int]]:
        """Whole ones as token ids, and where the answer's begin."""
        return self._template.ask("conversations", rows, rows=len(rows))()

    def items(self, rows: list[list[Message]], end_of_turn: bool) -> tuple[list[Item], np.ndarray]:
        """Rows as token ids, and whether the answer's are those that it has in the whole text."""
        return self.begin(rows, end_of_turn)()

    def begin(self, rows: list[list[Message]], end_of_turn: bool) -> Callable[[], tuple[list[Item], np.ndarray]]:
        """The same, without waiting for it: what is returned does."""
        end = self.end if end_of_turn else None
        if end_of_turn and end is None:
            raise UserError("this chat template has no end-of-turn token; set score.end_of_turn=false")
        answer = self._template.ask("rows", rows, rows=len(rows))

        def wait() -> tuple[list[Item], np.ndarray]:
            found: Rendered = answer()
            ids, at, items = found.ids.tolist(), 0, []
            for context, response in zip(found.contexts.tolist(), found.answers.tolist(), strict=True):
                middle = at + context
                items.append(Item(tuple(ids[at:middle]), tuple(ids[middle : middle + response]), end))
                at = middle + response
            return items, found.joint

        return wait
