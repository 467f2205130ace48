"""Chat rendering and token boundaries.

Three meanings of "no system prompt", since Qwen2.5's template writes a default system block where none is given:
    default   what the template does by itself (Qwen2.5: its own default block)
    empty     a system block with nothing in it
    none      no system block at all"""

from dataclasses import dataclass
from typing import Any

from lib.errors import UserError

Message = dict[str, str]
_S, _U = "sYsTeM0mArK", "uSeR0mArK"


@dataclass(frozen=True)
class Scored:
    """A tokenised row: the response is ids[start:]."""

    ids: list[int]
    start: int
    joint: bool  # tokenising context + response in one go gives the same ids

    @property
    def response_tokens(self) -> int:
        return len(self.ids) - self.start


class Renderer:
    """Turns messages into the text that precedes a response, and into token ids."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: use an Instruct model")
        self.tokenizer = tokenizer

    def context(self, turns: list[Message], system: str | None, mode: str) -> str:
        """Everything before the response: system block, turns, and the assistant's opening."""
        if system is not None:
            return self._render([{"role": "system", "content": system}, *turns])
        if mode == "default":
            return self._render(turns)
        if mode == "empty":
            return self._render([{"role": "system", "content": ""}, *turns])
        return self._without_block(turns)

    def _render(self, messages: list[Message]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _without_block(self, turns: list[Message]) -> str:
        """Cut the system block off: from the start (a BOS token apart) to where the first user block opens."""
        bos = self.tokenizer.bos_token or ""
        marked = self._render([{"role": "system", "content": _S}, {"role": "user", "content": _U}])
        before, _, after = marked.partition(_S)
        bos = bos if bos and before.startswith(bos) else ""
        opening = before[len(bos) :]  # e.g. <|im_start|>system\n
        first = next((t for t in self.tokenizer.all_special_tokens if t and opening.startswith(t)), None)
        between = after.partition(_U)[0]  # e.g. <|im_end|>\n<|im_start|>user\n
        if not first or first not in between:
            raise UserError("template mode 'none' is not known for this chat template; use base=default or base=empty")
        user_opening = between[between.rindex(first) :]
        text = self._render([{"role": "system", "content": _S}, *turns])
        block_end = text.index(user_opening, text.index(_S))
        return bos + text[block_end:]

    def tokenize(self, contexts: list[str], responses: list[str]) -> list[Scored]:
        """Context and response are tokenised apart: a model answers after the context's tokens, so this is the exact
        conditional. Where joining them first gives other ids (a response that starts with a newline), it is noted."""
        together = self._ids([c + r for c, r in zip(contexts, responses, strict=True)])
        out = []
        for head, tail, joint in zip(self._ids(contexts), self._ids(responses), together, strict=True):
            out.append(Scored(head + tail, len(head), head + tail == joint))
        return out

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
