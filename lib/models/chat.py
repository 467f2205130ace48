"""Chat rendering and token boundaries.

Three meanings of "no system prompt", since Qwen2.5's template writes a default system block where none is given:
    default   what the template does by itself (Qwen2.5: its own default block)
    empty     a system block with nothing in it
    none      no system block at all"""

from typing import Any

from lib.errors import UserError
from lib.models.packing import Item

Message = dict[str, str]
_S, _U, _A = "sYsTeM0mArK", "  uSeR0mArK\n ", "aNsWeR0mArK"  # the blanks show whether a template strips


class Renderer:
    """One meaning of the system prompt: the prefix that every row begins with, and what follows it in a row.

    The prefix ends with a special token, which no tokenizer merges with its neighbours: so it can be computed once."""

    def __init__(self, tokenizer: Any, system: str | None, mode: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: use an Instruct model")
        self.tokenizer, self.system, self.mode = tokenizer, system, mode
        user = [{"role": "user", "content": _U}]
        marked = self._whole(user)
        before, found, self._after = marked.partition(_U)
        self._verbatim = bool(found)
        if not found:
            before = marked.partition(_U.strip())[0]
        ends = [before.rindex(t) + len(t) for t in tokenizer.all_special_tokens if t and t in before]
        cut = max(ends, default=0)
        self.prefix_text, self._opening = before[:cut], before[cut:]
        self.prefix_ids: list[int] = self._ids([self.prefix_text])[0]
        closed = self._render([*user, {"role": "assistant", "content": _A}], generate=False).partition(_A)[2]
        self.end: int | None = next((i for i in self._ids([closed])[0][:1] if i in tokenizer.all_special_ids), None)

    def rest(self, turns: list[Message]) -> str:
        """A row's context after the prefix, to the assistant's opening."""
        if self._verbatim and len(turns) == 1 and turns[0]["role"] == "user":
            return self._opening + turns[0]["content"] + self._after
        return self._whole(turns).removeprefix(self.prefix_text)

    def items(self, rows: list[list[Message]], end_of_turn: bool) -> tuple[list[Item], list[bool]]:
        """Rows as token ids, and whether tokenising context and response as one text gives the same ids.

        They are tokenised apart: a model answers after the context's tokens, so that is the exact conditional. Where
        the join differs (a response that begins with a newline, say) it is noted."""
        rests = [self.rest([m for m in row[:-1] if m["role"] != "system"]) for row in rows]
        answers = [row[-1]["content"] for row in rows]
        end = self.end if end_of_turn else None
        if end_of_turn and end is None:
            raise UserError("this chat template has no end-of-turn token; set score.end_of_turn=false")
        together = self._ids([r + a for r, a in zip(rests, answers, strict=True)])
        items, joint = [], []
        for head, tail, both in zip(self._ids(rests), self._ids(answers), together, strict=True):
            items.append(Item(tuple(head), tuple(tail), end))
            joint.append(head + tail == both)
        return items, joint

    def _whole(self, turns: list[Message]) -> str:
        if self.system is not None:
            return self._render([{"role": "system", "content": self.system}, *turns])
        if self.mode == "default":
            return self._render(turns)
        if self.mode == "empty":
            return self._render([{"role": "system", "content": ""}, *turns])
        return self._without_block(turns)

    def _render(self, messages: list[Message], generate: bool = True) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    def _without_block(self, turns: list[Message]) -> str:
        """Cut the system block off: from the start (a BOS token apart) to where the first user block opens."""
        bos = self.tokenizer.bos_token or ""
        user = _U.strip()
        marked = self._render([{"role": "system", "content": _S}, {"role": "user", "content": user}])
        before, _, after = marked.partition(_S)
        bos = bos if bos and before.startswith(bos) else ""
        opening = before[len(bos) :]  # e.g. <|im_start|>system\n
        first = next((t for t in self.tokenizer.all_special_tokens if t and opening.startswith(t)), None)
        between = after.partition(user)[0]  # e.g. <|im_end|>\n<|im_start|>user\n
        if not first or first not in between:
            raise UserError("template mode 'none' is not known for this chat template; use base=default or base=empty")
        user_opening = between[between.rindex(first) :]
        text = self._render([{"role": "system", "content": _S}, *turns])
        return bos + text[text.index(user_opening, text.index(_S)) :]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
