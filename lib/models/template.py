"""Chat rendering and token boundaries: a model's own template, which is a program that its folder brought along.

Three meanings of "no system prompt", since Qwen2.5's template writes a default system block where none is given:
    default   what the template does by itself (Qwen2.5: its own default block)
    empty     a system block with nothing in it
    none      no system block at all"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from jinja2 import TemplateError

from lib.base.errors import UserError, one_line

Message = dict[str, str]
_S, _U, _A = "sYsTeM0mArK", "  uSeR0mArK\n ", "aNsWeR0mArK"


@dataclass(frozen=True)
class Head:
    """What all rows have in common."""

    prefix_text: str
    prefix_ids: list[int]
    end: int | None  # the end-of-turn token


@dataclass(frozen=True)
class Rendered:
    """Rows as token ids: of each its context after the prefix and its answer, one row after another."""

    ids: np.ndarray  # int32
    contexts: np.ndarray  # int32, tokens of each row's context
    answers: np.ndarray  # int32, of its answer
    joint: np.ndarray  # uint8, whether the answer's tokens are those that it has in the whole text


class Template:
    """One meaning of the system prompt: the prefix that every row begins with, and what follows it in a row.

    The prefix ends with a special token, which no tokenizer merges with its neighbours: so it can be computed once.
    What a template prints of the date is `date`'s, an ISO day, whenever it is rendered."""

    def __init__(self, tokenizer: Any, system: str | None, mode: str, date: str) -> None:
        self.tokenizer, self.system, self.mode = tokenizer, system, mode
        day = datetime.fromisoformat(date)
        # In place of transformers' strftime_now, which is the clock, and in the form that Llama-3.1's template takes.
        self._date = {"strftime_now": day.strftime, "date_string": day.strftime("%d %b %Y")}
        user = [{"role": "user", "content": _U}]
        marked = self._whole([user])[0]
        before = marked.partition(_U if _U in marked else _U.strip())[0]
        ends = [before.rindex(t) + len(t) for t in tokenizer.all_special_tokens if t and t in before]
        text = before[: max(ends, default=0)]
        answered = self._render([[*user, {"role": "assistant", "content": _A}]], generate=False)[0]
        self._closing = answered.partition(_A)[2]
        end = next((i for i in self._ids([self._closing])[0][:1] if i in tokenizer.all_special_ids), None)
        self._head = Head(text, self._ids([text])[0], end)
        self._mark = self._cutting(self._head)
        self._in_place = lru_cache(lambda text: self._ids([text])[0])

    def head(self) -> Head:
        return self._head

    def contexts(self, rows: list[list[Message]]) -> list[str]:
        """Each row's text up to where the assistant's answer begins. All begin with the prefix."""
        texts = self._whole(rows)
        for turns, text in zip(rows, texts, strict=True):
            if not text.startswith(self._head.prefix_text):
                raise UserError(
                    f"the chat template begins the row {_shown(turns)} otherwise than others, which share what they "
                    "begin with: leave such rows out, e.g. those whose first turn is not the user's"
                )
        return texts

    def rows(self, rows: list[list[Message]]) -> Rendered:
        """The context is tokenised as a whole, since that is what a model answers to; the answer where it stands, since
        a tokenizer may treat a text's beginning apart. Where answer and context merge (an answer that begins with a
        newline, say) no token begins the answer: it is then tokenised alone, which is noted."""
        turns = [[m for m in row[:-1] if m["role"] != "system"] for row in rows]
        contexts = self.contexts(turns)
        answers = [row[-1]["content"] for row in rows]
        together = self._ids([c + a for c, a in zip(contexts, answers, strict=True)])
        heads, prefix = self._heads(contexts, answers, together), self._head.prefix_ids
        n, joint = len(prefix), [both[: len(head)] == head for head, both in zip(heads, together, strict=True)]
        apart = [row for row, same in enumerate(joint) if not same]
        alone = dict(zip(apart, self._ids([answers[row] for row in apart]), strict=True))
        found: list[Sequence[int]] = []
        for row, (head, both) in enumerate(zip(heads, together, strict=True)):
            if head[:n] != prefix or len(head) == n:
                raise UserError(
                    f"the row {_shown(turns[row])} begins with other tokens than the rest, or with nothing else; they "
                    "share what they begin with: leave such rows out, or use another base"
                )
            found += [head[n:], alone[row] if row in alone else both[len(head) :]]
        lengths = np.array([len(ids) for ids in found], np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, int(lengths.sum()))
        return Rendered(ids, lengths[::2], lengths[1::2], np.array(joint, np.uint8))

    def conversations(self, rows: list[list[Message]]) -> tuple[list[list[int]], list[int]]:
        """Whole ones with the end of the last turn, each tokenised as one text, and where its answer's tokens begin: a
        token in which context and answer merge counts as the answer's."""
        contexts = self.contexts([row[:-1] for row in rows])
        rest = [row[-1]["content"] + self._closing for row in rows]
        together = self._ids([c + r for c, r in zip(contexts, rest, strict=True)])
        starts = []
        for head, both in zip(self._heads(contexts, rest, together), together, strict=True):
            same = (i for i, (a, b) in enumerate(zip(head, both, strict=False)) if a != b)
            starts.append(next(same, len(head)))
        return together, starts

    def _heads(self, contexts: list[str], answers: list[str], together: list[list[int]]) -> list[list[int]]:
        """The contexts' own tokens, for half of the work. A tokenizer cuts a text at such tokens as the prefix ends
        with before anything else: so they are those of the whole text up to the last of these in the context, and those
        of what follows there, the same few words in all rows. Where it is not plain which one that is: tokenised."""
        mark, found = self._mark, dict[int, list[int]]()
        if mark:
            for row, (context, answer, both) in enumerate(zip(contexts, answers, together, strict=True)):
                before = context.count(mark.content)
                if both.count(mark_id := self._head.prefix_ids[-1]) == (context + answer).count(mark.content):
                    at = -1
                    for _ in range(before):
                        at = both.index(mark_id, at + 1)
                    found[row] = both[:at] + self._in_place(context[context.rindex(mark.content) :])
        rest = [row for row in range(len(contexts)) if row not in found]
        found.update(zip(rest, self._ids([contexts[row] for row in rest]), strict=True))
        return [found[row] for row in range(len(contexts))]

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
        except Exception as e:  # a template is a program: whatever it stumbles over
            if len(rows) > 1:
                return [self._render([row], generate)[0] for row in rows]  # which of them is it?
            why = one_line(e) if isinstance(e, TemplateError) else f"{type(e).__name__}: {one_line(e)}".rstrip(": ")
            raise UserError(
                f"the chat template does not render {_shown(rows[0])} ({why}); use another base or model, or leave "
                "such rows out"
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

    def _cutting(self, head: Head) -> Any:
        """The token that the prefix ends with, if texts are cut there whatever stands beside it."""
        tokens = self.tokenizer.added_tokens_decoder if self.tokenizer.is_fast and head.prefix_ids else {}
        last = tokens.get(head.prefix_ids[-1]) if tokens else None
        if last is None or last.lstrip or last.rstrip or last.single_word or last.normalized:
            return None
        return last if head.prefix_text.endswith(last.content) else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        more = {"return_attention_mask": False, "return_token_type_ids": False}  # a third of the time
        return self.tokenizer(texts, add_special_tokens=False, **more)["input_ids"] if texts else []


def _shown(turns: list[Message]) -> str:
    """A row as a sentence names it."""
    if any(mark in m["content"] for m in turns for mark in (_U.strip(), _A)):
        return "a plain conversation"
    return repr(" | ".join(f"{m['role']}: {m['content']}" for m in turns)[:80])
