"""Rows laid end to end in batches of a fixed number of tokens, sharing what they have in common.

A batch is a tree two levels deep under one prefix (the system block, whose keys and values are computed once):

    prefix -> context of a row (its user turn)  -> response
                                                -> response of another data set to the same context

Every batch has the same number of tokens, so every matrix product has the same shape; attention looks at each segment
by itself. A row's bits therefore depend on its own tokens alone, not on its neighbours, its place or its batch."""

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


def pack(items: Sequence[Item], prefix: int, batch_tokens: int) -> Iterator[Batch]:
    """Batches over all items in their order; items with equal contexts one after another share one."""
    groups: list[list[int]] = []
    used = 0
    for number, item in enumerate(items):
        shares = bool(groups) and items[groups[-1][0]].context == item.context
        cost = len(item.inputs) + (0 if shares else len(item.context))
        if used + cost > batch_tokens:
            yield _batch(items, groups, prefix, batch_tokens)
            groups, used, shares = [], 0, False
            cost = len(item.inputs) + len(item.context)
        if shares:
            groups[-1].append(number)
        else:
            groups.append([number])
        used += cost
    if groups:
        yield _batch(items, groups, prefix, batch_tokens)


def _batch(items: Sequence[Item], groups: list[list[int]], prefix: int, batch_tokens: int) -> Batch:
    ids = np.zeros(batch_tokens, np.int64)
    positions = np.zeros(batch_tokens, np.int64)
    segments, where, targets, rows = [], [], [], []
    at = 0

    def place(tokens: Sequence[int], parent: int, before: int) -> int:
        """Put a segment at the end of the batch, under the parent that begins there; returns where it begins."""
        nonlocal at
        start, n = at, len(tokens)
        ids[at : at + n] = tokens
        positions[at : at + n] = np.arange(prefix + before, prefix + before + n)
        segments.append((start, n, parent, before))
        at += n
        return start

    for group in groups:
        context = items[group[0]].context
        parent = place(context, 0, 0)
        for number in group:
            item = items[number]
            where.append(parent + len(context) - 1)  # the context's last token predicts the response's first
            if item.inputs:
                start = place(item.inputs, parent, len(context))
                where.extend(range(start, at))
            targets.extend(item.targets)
            rows.append(number)
    return Batch(
        ids,
        positions,
        np.array(segments, np.int32),
        np.asarray(where, np.int64),
        np.asarray(targets, np.int64),
        tuple(rows),
        at,
    )


def prefix_batch(ids: Sequence[int]) -> Batch:
    """The prefix itself, as one segment without anything before it."""
    n, none = len(ids), np.empty(0, np.int64)
    segments = np.array([[0, n, 0, 0]], np.int32)
    return Batch(np.asarray(ids, np.int64), np.arange(n, dtype=np.int64), segments, none, none, (), n)
