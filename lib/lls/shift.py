"""LLS of a row = mean over response tokens of log p(token | system prompt, user prompt) minus the same without the
system prompt. Sums and counts are returned, so that means, sums and merges are all exact."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np

from lib.base.errors import UserError
from lib.inputs.records import ChatRow, Messages
from lib.models.chat import Renderer
from lib.models.decoder import Decoder, Prefix
from lib.models.packing import Item
from lib.models.scorer import Scorer


class Status(IntEnum):
    """Why a row has a score or none."""

    scored = 0
    empty = 1  # the response has no token
    too_long = 2  # longer than score.max_tokens or the model's positions, under any of the conditions


@dataclass(frozen=True)
class Ready:
    """Rows as token ids under each condition (a system prompt, or none)."""

    items: dict[str, list[Item]]
    joint: np.ndarray
    status: np.ndarray

    def alone(self, prefixes: Sequence[int]) -> int:
        """Tokens of as many passes in which every row is computed by itself, prefix and all."""
        good = np.flatnonzero(self.status == Status.scored)
        items = next(iter(self.items.values()))
        rest = sum(len(items[i].context) + len(items[i].inputs) for i in good)
        return sum(length * len(good) + rest for length in prefixes)

    def only(self, chosen: np.ndarray) -> "Ready":
        items = {name: [of[i] for i in chosen] for name, of in self.items.items()}
        return Ready(items, self.joint[chosen], self.status[chosen])


def conditions(decoder: Decoder, renderers: Mapping[str, Renderer]) -> dict[str, Prefix]:
    """The prefix of each condition, computed once for all rows."""
    return {name: decoder.prefix(renderer.prefix_ids) for name, renderer in renderers.items()}


def prepare(renderers: Mapping[str, Renderer], rows: Sequence[ChatRow | Messages], max_tokens: int, end: bool) -> Ready:
    """Tokenise rows ({"messages": ...} or their messages), under all conditions at once: host work, without a model."""
    messages = [row["messages"] if isinstance(row, dict) else row for row in rows]
    items, joint, length = {}, np.ones(len(rows), np.uint8), np.zeros(len(rows), np.int64)
    begun = {name: renderer.begin(messages, end) for name, renderer in renderers.items()}
    for name, renderer in renderers.items():
        items[name], same = begun[name]()
        joint &= same
        tokens = [len(renderer.prefix_ids) + len(i.context) + len(i.targets) for i in items[name]]
        length = np.maximum(length, np.array(tokens, np.int64))
    first, *others = items.values()
    for row, item in enumerate(first):
        if any(other[row].response != item.response for other in others):
            raise UserError(
                f"the answer {' '.join(messages[row][-1]['content'].split())[:80]!r} has other tokens after one system "
                "prompt than after another, so there is no shift of it; leave the row out"
            )
    empty = np.array([not i.response for i in first], bool)
    status = np.where(empty, Status.empty, np.where(length > max_tokens, Status.too_long, Status.scored))
    return Ready(items, joint, status.astype(np.uint8))


Score = Scorer | Callable[[Prefix, Sequence[Item]], list[np.ndarray]]  # the second: its one_by_one


def shift(score: Score, prefixes: Mapping[str, Prefix], ready: Ready) -> dict[str, np.ndarray]:
    """Columns: status, joint, tokens, and for each condition NAME_sum, NAME_end and NAME_logp (row after row)."""
    good = np.flatnonzero(ready.status == Status.scored)
    tokens = np.zeros(len(ready.status), np.int32)
    tokens[good] = [len(next(iter(ready.items.values()))[i].response) for i in good]
    columns = {"status": ready.status, "joint": ready.joint, "tokens": tokens}
    begin = score.begin if isinstance(score, Scorer) else partial(partial, score)  # all passes are under way at once
    begun = {name: begin(prefix, [ready.items[name][i] for i in good]) for name, prefix in prefixes.items()}
    for name, values in begun.items():
        columns |= _columns(name, good, values(), tokens)
    return columns


def _columns(name: str, good: np.ndarray, values: list[np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """float64 sums over the response; NaN, never zero, where there is no score. The end of turn stands apart."""
    sums, ends = np.full(len(tokens), np.nan), np.full(len(tokens), np.nan, np.float32)
    responses = [v[: tokens[i]] for i, v in zip(good, values, strict=True)]
    sums[good] = [v.sum(dtype=np.float64) for v in responses]
    ends[good] = [v[tokens[i]] if len(v) > tokens[i] else np.nan for i, v in zip(good, values, strict=True)]
    logp = np.concatenate([*responses, np.empty(0, np.float32)])
    return {f"{name}_sum": sums, f"{name}_end": ends, f"{name}_logp": logp}
