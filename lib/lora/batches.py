"""Rows laid end to end in micro-batches of a few fixed sizes: each size is a shape of every matrix product, and on a
GPU one captured graph. What is left of a batch is filled with rows of zeros, which have no loss."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lib.base.errors import UserError
from lib.lora.relay import EVEN, Ends
from lib.lora.rows import Row

GRAIN, FINE = 256, 64  # tokens: sizes are multiples of it; where batches are thin, of the finer
FILLER = 256  # tokens of a row of zeros, at most


@dataclass(frozen=True)
class Micro:
    """Arrays of one micro-batch."""

    ids: np.ndarray  # int64 [M]
    positions: np.ndarray  # int64 [M]
    segments: np.ndarray  # int32 [S, 2]: first token, length; fillers too
    where: np.ndarray  # int64 [P]: positions that predict; filled up with the last one
    targets: np.ndarray  # int64 [P]: what they predict; filled up with -1, which is no token
    scored: int  # that are no filling

    @property
    def size(self) -> tuple[int, int]:
        return len(self.ids), len(self.where)


def micro_batches(rows: Sequence[Row], most: int, grain: int = GRAIN, ends: Ends = EVEN) -> Iterator[Micro]:
    """All rows in their order, in as few batches of at most so many tokens as can be, about equally full; or with
    smaller ones before and after these."""
    total, (first, last) = sum(len(row.ids) for row in rows), ends
    whole = max(1, math.ceil(total / most - sum(first) - sum(last)))
    shares = [*first, *[1] * whole, *last]
    wanted = total / sum(shares)
    batch: list[Row] = []
    used = done = parts = 0
    for row in rows:
        length = len(row.ids)
        if length > most:
            raise UserError(f"a row has {length} tokens, and a micro-batch takes {most}; lower max_length")
        full = batch and (used + length > most or done + length / 2 > wanted * sum(shares[: parts + 1]))
        if full:
            yield _micro(batch, grain)
            batch, used, parts = [], 0, parts + 1
        batch.append(row)
        used, done = used + length, done + length
    if batch:
        yield _micro(batch, grain)


def _micro(rows: Sequence[Row], grain: int) -> Micro:
    lengths = [len(row.ids) for row in rows]
    used = sum(lengths)
    tokens = round_up(used, grain)
    lengths += [min(FILLER, tokens - at) for at in range(used, tokens, FILLER)]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.zeros(tokens, np.int64)
    ids[:used] = [token for row in rows for token in row.ids]
    positions = np.arange(tokens) - np.repeat(starts, lengths)
    where = np.concatenate(
        [np.arange(s + row.first - 1, s + len(row.ids) - 1) for s, row in zip(starts, rows, strict=False)]
    )
    # Few sizes where whole rows are scored.
    places = tokens if 2 * len(where) > tokens else min(tokens, round_up(len(where)))
    targets = np.full(places, -1, np.int64)
    targets[: len(where)] = ids[where + 1]
    padded = np.full(places, tokens - 1, np.int64)
    padded[: len(where)] = where
    segments = np.stack([starts, lengths], 1).astype(np.int32)
    return Micro(ids, positions, segments, padded, targets, len(where))


def round_up(n: int, grain: int = GRAIN) -> int:
    return -(-n // grain) * grain


def tiles(segments: np.ndarray, group: int, tile: int, most: int) -> np.ndarray:
    """int32 [most, 3]: (start, length, first row) of every tile of so many rows, `group` rows a token; what is left has
    length 0, which is no work."""
    counts = -(-segments[:, 1] * group // tile)
    which = np.repeat(np.arange(len(segments)), counts)
    first = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((most, 3), np.int32)
    found[: len(which)] = np.concatenate([segments[which], (first * tile)[:, None]], 1)
    return found


def most_tiles(tokens: int, group: int, tile: int, rows: int) -> int:
    """Of a micro-batch of so many tokens and at most so many rows, fillers among them."""
    return tokens * group // tile + rows + GRAIN // FILLER + 1
