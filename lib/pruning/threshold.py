"""The lowest K of billions of scores, exactly, without sorting them: one read to find the threshold, one to apply it.

A sample says where the threshold will lie. One read then counts what lies below that stretch, and inside of it each
float32 by its bits. Should the threshold lie elsewhere, two more reads find it: the upper 16 bits of all, then the
lower ones. So the sample decides how long it takes, never the result. Ties at the threshold go by (layer, index).

A core compares 2 GB/s so; it would count all bits at 0.6."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod
from threading import Lock
from typing import TypeVar

import numpy as np
import torch

from lib.base.errors import UserError
from lib.pruning.scores import PIECE, THREADS, Scores

BLOCK = 1 << 16  # values compared at once: they stay in a core's cache
CHUNK, CHUNKS = 1 << 10, 1 << 12  # the sample: so many runs of so many values, evenly over all
SIGMAS = 5  # of the sample's own error, on either side of its threshold
MOST = 1 << 22  # neighbouring floats that are counted one by one
BIN = 1 << 16  # floats that share their upper 16 bits
KEY_INF = 0x7F800000
T = TypeVar("T")


@dataclass(frozen=True)
class Threshold:
    """All below `value` go, and of the `equal` ones the first `ties`."""

    value: np.float32
    ties: int
    equal: int


def find_threshold(scores: Sequence[Scores], count: int) -> Threshold:
    total = sum(prod(one.shape) for one in scores)
    if not 0 <= count <= total:
        raise UserError(f"{count} of {total} weights cannot be pruned; choose a share between 0 and 1")
    if count == 0:
        return Threshold(np.float32(-np.inf), 0, 1)
    first, size = _guess(scores, count / total)
    below, counts = _tally(scores, first, size)
    if not below < count <= below + counts.sum():
        first, size = (int(np.searchsorted(_upper(scores).cumsum(), count)) - BIN // 2) * BIN, BIN
        below, counts = _tally(scores, first, size)
    upto = counts.cumsum() + below
    at = int(np.searchsorted(upto, count))
    return Threshold(_value(first + at), int(count - upto[at] + counts[at]), int(counts[at]))


def masks(scores: Sequence[Scores], threshold: Threshold) -> Iterator[tuple[str, np.ndarray]]:
    """Layer by layer in their order, what goes: bool [J, I]. The next layer is read while one is used."""
    some, left = threshold.ties < threshold.equal, threshold.ties
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: tuple[Scores, np.ndarray, list[Future[np.ndarray]]] | None = None
        for one in chain(scores, [None]):
            coming = None if one is None else _mask(pool, one, threshold, some)
            if waiting is not None:
                layer, mask, parts = waiting
                for part in parts:
                    ties = part.result()[:left]
                    mask[ties] = True
                    left -= len(ties)
                yield layer.name, mask.reshape(layer.shape)
            waiting = coming


def _mask(
    pool: ThreadPoolExecutor, one: Scores, threshold: Threshold, some: bool
) -> tuple[Scores, np.ndarray, list[Future[np.ndarray]]]:
    """`some` of the ties go: then each piece says where they are."""
    mask = np.empty(prod(one.shape), bool)

    def fill(start: int) -> np.ndarray:
        values, out = _piece(one, start), mask[start : start + PIECE]
        (np.less if some else np.less_equal)(values, threshold.value, out=out)
        return np.flatnonzero(values == threshold.value) + start if some else np.empty(0, np.int64)

    return one, mask, [pool.submit(fill, start) for start in range(0, len(mask), PIECE)]


def _tally(scores: Sequence[Scores], first: int, size: int) -> tuple[int, np.ndarray]:
    """(values below the float of key `first`, how often each of the `size` floats from there on occurs): one read."""
    low, high = _value(max(first, ~KEY_INF)), _value(min(first + size - 1, KEY_INF))
    counts, lock = np.zeros(size, np.int64), Lock()

    def look(place: tuple[Scores, int]) -> int:
        below, found = 0, []
        for values in _blocks(place):
            below += int(np.count_nonzero(values < low))
            found.append(values[(values >= low) & (values <= high)])
        keys = _keys(np.concatenate(found)).astype(np.int64) - first
        keys = keys[keys < size]  # high may be -0.0, which 0.0 is equal to
        with lock:
            np.add.at(counts, keys, 1)
        return below

    return sum(_everywhere(look, scores)), counts


def _upper(scores: Sequence[Scores]) -> np.ndarray:
    """How many values there are of each upper half of a key: one read."""
    counts, lock = np.zeros(BIN, np.int64), Lock()

    def look(place: tuple[Scores, int]) -> None:
        upper = np.concatenate([(_keys(values) >> 16) + BIN // 2 for values in _blocks(place)])
        found = torch.bincount(torch.from_numpy(upper), minlength=BIN).numpy()  # numpy's takes five times as long
        with lock:
            np.add(counts, found, out=counts)

    list(_everywhere(look, scores))
    return counts


def _guess(scores: Sequence[Scores], share: float) -> tuple[int, int]:
    """(first, size) of the keys among which the threshold probably is."""
    sizes = [prod(one.shape) for one in scores]
    ends = list(accumulate(sizes))
    chunks = min(CHUNKS, -(-ends[-1] // CHUNK))

    def take(number: int) -> np.ndarray:
        at = number * ends[-1] // chunks
        which = int(np.searchsorted(ends, at, "right"))
        start = at - ends[which] + sizes[which]
        return scores[which].read(start, min(start + CHUNK, sizes[which]))

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(take, range(chunks)))
    sample = np.concatenate(found)
    guess = np.partition(sample, rank := int(share * (len(sample) - 1)))[rank]
    # Values of one row resemble each other: how far a run's share below the guess strays says how far the guess does.
    strays = np.std([np.count_nonzero(run <= guess) / len(run) for run in found])
    margin = int(len(sample) * SIGMAS * strays / chunks**0.5) + SIGMAS
    ranks = [max(rank - margin, 0), rank, min(rank + margin, len(sample) - 1)]
    low, middle, high = (int(key) for key in _keys(np.partition(sample, ranks)[ranks]))
    low, high = max(low, middle - MOST // 2), min(high, middle + MOST // 2 - 1)
    return low, high - low + 1


def _everywhere(look: Callable[[tuple[Scores, int]], T], scores: Sequence[Scores]) -> Iterator[T]:
    places = [(one, start) for one in scores for start in range(0, prod(one.shape), PIECE)]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(look, places)


def _blocks(place: tuple[Scores, int]) -> Iterator[np.ndarray]:
    values = _piece(*place)
    for at in range(0, len(values), BLOCK):
        block = values[at : at + BLOCK]
        if np.isnan(block).any():
            raise UserError(
                f"scores of {place[0].name} hold NaN, which has no place in an order; attribute again with "
                "score.nonfinite: 0, which stops where it arises"
            )
        yield block


def _piece(one: Scores, start: int) -> np.ndarray:
    return one.read(start, min(start + PIECE, prod(one.shape)))


def _keys(values: np.ndarray) -> np.ndarray:
    """int32 in the order of the floats; both zeros are one."""
    bits = (values + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: int) -> np.float32:
    return np.float32(np.array(key ^ (0x7FFFFFFF if key < 0 else 0), np.int64).astype(np.int32).view(np.float32))
