"""Chat rendering and token boundaries.

Three meanings of "no system prompt", since Qwen2.5's template writes a default system block where none is given:
    default   what the template does by itself (Qwen2.5: its own default block)
    empty     a system block with nothing in it
    none      no system block at all"""

from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from lib.base.errors import UserError, one_line
from lib.models.packing import Item

Message = dict[str, str]
_S, _U, _A = "sYsTeM0mArK", "  uSeR0mArK\n ", "aNsWeR0mArK"


class Renderer:
    """One meaning of the system prompt: the prefix that every row begins with, and what follows it in a row.

    The prefix ends with a special token, which no tokenizer merges with its neighbours: so it can be computed once.
    What a template prints of the date is `date`'s, an ISO day, whenever it is rendered."""

    def __init__(self, tokenizer: Any, system: str | None, mode: str, date: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: use an Instruct model")
        self.tokenizer, self.system, self.mode = tokenizer, system, mode
        day = datetime.fromisoformat(date)
        # In place of transformers' strftime_now, which is the clock, and in the form that Llama-3.1's template takes.
        self._date = {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}
        user = [{"role": "user", "content": _U}]
        marked = self._whole([user])[0]
        before = marked.partition(_U if _U in marked else _U.strip())[0]
        ends = [before.rindex(t) + len(t) for t in tokenizer.all_special_tokens if t and t in before]
        self.prefix_text = before[: max(ends, default=0)]
        self.prefix_ids: list[int] = self._ids([self.prefix_text])[0]
        closed = self._render([[*user, {"role": "assistant", "content": _A}]], generate=False)[0].partition(_A)[2]
        self.end: int | None = next((i for i in self._ids([closed])[0][:1] if i in tokenizer.all_special_ids), None)

    def contexts(self, rows: list[list[Message]]) -> list[str]:
        """Each row's text up to where the assistant's answer begins. All begin with the prefix."""
        texts = self._whole(rows)
        for turns, text in zip(rows, texts, strict=True):
            if not text.startswith(self.prefix_text):
                raise UserError(
                    f"the chat template begins the row {_shown(turns)} otherwise than others, which share what they "
                    "begin with: leave such rows out, e.g. those whose first turn is not the user's"
                )
        return texts

    def items(self, rows: list[list[Message]], end_of_turn: bool) -> tuple[list[Item], list[bool]]:
        """Rows as token ids, and whether the answer's are those that it has in the whole text.

        The context is tokenised as a whole, since that is what a model answers to; the answer where it stands, since a
        tokenizer may treat a text's beginning apart. Where answer and context merge (an answer that begins with a
        newline, say) no token begins the answer: it is then tokenised alone, which is noted."""
        end = self.end if end_of_turn else None
        if end_of_turn and end is None:
            raise UserError("this chat template has no end-of-turn token; set score.end_of_turn=false")
        turns = [[m for m in row[:-1] if m["role"] != "system"] for row in rows]
        contexts = self.contexts(turns)
        answers = [row[-1]["content"] for row in rows]
        together = self._ids([c + a for c, a in zip(contexts, answers, strict=True)])
        heads, n = self._ids(contexts), len(self.prefix_ids)
        joint = [both[: len(head)] == head for head, both in zip(heads, together, strict=True)]
        apart = [row for row, same in enumerate(joint) if not same]
        alone = dict(zip(apart, self._ids([answers[row] for row in apart]), strict=True))
        items = []
        for row, (head, both) in enumerate(zip(heads, together, strict=True)):
            if head[:n] != self.prefix_ids or len(head) == n:
                raise UserError(
                    f"the row {_shown(turns[row])} begins with other tokens than the rest, or with nothing else; they "
                    "share what they begin with: leave such rows out, or use another base"
                )
            items.append(Item(tuple(head[n:]), tuple(alone[row] if row in alone else both[len(head) :]), end))
        return items, joint

    def _whole(self, rows: list[list[Message]]) -> list[str]:
        if self.system is None and self.mode == "none":
            return self._without_block(rows)
        system = "" if self.system is None else self.system
        front = [] if self.system is None and self.mode == "default" else [{"role": "system", "content": system}]
        return self._render([[*front, *turns] for turns in rows])

    def _render(self, rows: list[list[Message]], generate: bool = True) -> list[str]:
        """All in one call, which takes half the time of one a row."""
        if not rows:
            return []
        try:
            return self.tokenizer.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=generate, **self._date
            )
        except TemplateError as e:
            if len(rows) > 1:
                return [self._render([row], generate)[0] for row in rows]  # which of them is it?
            raise UserError(
                f"the chat template does not render {_shown(rows[0])} ({one_line(e)}); "
                "leave such rows out, or use another base"
            ) from None

    def _without_block(self, rows: list[list[Message]]) -> list[str]:
        """Cut the system block off: from the start (a BOS token apart) to where the next block opens, whoever's."""
        bos = self.tokenizer.bos_token or ""
        user, system = _U.strip(), {"role": "system", "content": _S}
        marked = self._render([[system, {"role": "user", "content": user}]])[0]
        before, _, after = marked.partition(_S)
        bos = bos if bos and before.startswith(bos) else ""
        opening = before[len(bos) :]  # e.g. <|im_start|>system\n
        first = next((t for t in self.tokenizer.all_special_tokens if t and opening.startswith(t)), None)
        between = after.partition(user)[0]  # e.g. <|im_end|>\n<|im_start|>user\n
        if not first or first not in between:
            raise UserError("template mode 'none' is not known for this chat template; use base=default or base=empty")
        block = before + _S + between[: between.rindex(first)]
        texts = self._render([[system, *turns] for turns in rows])
        for turns, text in zip(rows, texts, strict=True):
            if not text.startswith(block):
                raise UserError(
                    f"the chat template writes the system block before {_shown(turns)} otherwise than elsewhere, so it "
                    "cannot be cut off; leave such rows out, or use base=default or base=empty"
                )
        return [bos + text[len(block) :] for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _shown(turns: list[Message]) -> str:
    """A row as a sentence names it."""
    return repr(" | ".join(f"{m['role']}: {m['content']}" for m in turns)[:80])
