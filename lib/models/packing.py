"""Rows laid end to end in batches of a fixed number of tokens, sharing what they have in common.

A batch is a tree two levels deep under one prefix (the system block, whose keys and values are computed once):

    prefix -> context of a row (its user turn)  -> response
                                                -> response of another data set to the same context

Every batch has the same number of tokens, so every matrix product has the same shape; attention looks at each segment
by itself. A row's bits therefore depend on its own tokens alone, not on its neighbours, its place or its batch. Where
rows are always computed together, all of them, batches may be as small as what they hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Item:
    """What is computed of a row: its context after the prefix, its response, and the tokens that are scored."""

    context: tuple[int, ...]
    response: tuple[int, ...]
    end: int | None = None  # the end-of-turn token, where it is scored too

    @property
    def targets(self) -> tuple[int, ...]:
        return self.response if self.end is None else (*self.response, self.end)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Response tokens that something is predicted from: the last scored one is never read."""
        return self.targets[:-1]


@dataclass(frozen=True)
class Batch:
    """Arrays of one batch."""

    ids: np.ndarray  # int64 [M], padded with 0
    positions: np.ndarray  # int64 [M]
    segments: np.ndarray  # int32 [S, 4]: first token, length, the parent's first token, its length
    where: np.ndarray  # int64 [Q], the positions that predict
    targets: np.ndarray  # int64 [Q], what they predict
    rows: tuple[int, ...]  # item numbers, in the order of `where`
    used: int  # tokens that are not padding


def pack(items: Sequence[Item], prefix: int, batch_tokens: int, grain: int | None = None) -> Iterator[Batch]:
    """Batches over all items in their order; items with equal contexts one after another share one. With a grain a
    batch has as many tokens as it needs, rounded up to a multiple of that."""
    groups: list[list[int]] = []
    used = 0

    def fitted(tokens: int) -> int:
        return min(batch_tokens, -(-tokens // grain) * grain) if grain else batch_tokens

    for number, item in enumerate(items):
        shares = bool(groups) and items[groups[-1][0]].context == item.context
        cost = len(item.inputs) + (0 if shares else len(item.context))
        if used + cost > batch_tokens:
            yield _batch(items, groups, prefix, fitted(used))
            groups, used, shares = [], 0, False
            cost = len(item.inputs) + len(item.context)
        if shares:
            groups[-1].append(number)
        else:
            groups.append([number])
        used += cost
    if groups:
        yield _batch(items, groups, prefix, fitted(used))


def _batch(items: Sequence[Item], groups: list[list[int]], prefix: int, batch_tokens: int) -> Batch:
    """Python says what stands where, a segment at a time; numpy fills in each token's place."""
    tokens: list[int] = []
    targets: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    rows: list[int] = []
    spoken: list[tuple[int, int, int]] = []  # of each row: the context's last token, its own segment and its length
    for group in groups:
        context, parent = items[group[0]].context, len(tokens)
        segments.append((parent, len(context), 0, 0))
        tokens.extend(context)
        for number in group:
            inputs, start = items[number].inputs, len(tokens)
            if inputs:
                segments.append((start, len(inputs), parent, len(context)))
                tokens.extend(inputs)
            spoken.append((parent + len(context) - 1, start, len(inputs)))
            targets.extend(items[number].targets)
            rows.append(number)
    used, laid = len(tokens), np.array(segments, np.int32)
    ids, positions = np.zeros(batch_tokens, np.int64), np.zeros(batch_tokens, np.int64)
    ids[:used] = tokens
    start, length, _, before = laid.T.astype(np.int64)
    positions[:used] = np.arange(used) + np.repeat(prefix + before - start, length)
    last, own, count = np.array(spoken, np.int64).T
    # The context's last token predicts the response's first, and each of the response's the one after it.
    ends = np.cumsum(count + 1)
    where = np.arange(ends[-1]) + np.repeat(own - 1 - (ends - count - 1), count + 1)
    where[ends - count - 1] = last
    return Batch(ids, positions, laid, where, np.array(targets, np.int64), tuple(rows), used)


def prefix_batch(ids: Sequence[int]) -> Batch:
    """The prefix itself, as one segment without anything before it."""
    n, none = len(ids), np.empty(0, np.int64)
    segments = np.array([[0, n, 0, 0]], np.int32)
    return Batch(np.asarray(ids, np.int64), np.arange(n, dtype=np.int64), segments, none, none, (), n)
