"""How far a selection of neurons depends on the samples that it was made from.

A selection is the N lowest (or highest) neurons by their mean score over samples, ties by index; a mean that is
NaN or infinite is never among them. Suffixes: S samples, N neurons, R resamples."""

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK_VALUES = 1 << 22  # scores turned to float64 at once: 32 MB
GROUP = 16  # resamples held at once: 59 MB for 458,752 neurons


def mean_over_samples(scores_SN: np.ndarray) -> np.ndarray:
    """In float64."""
    return _sums(scores_SN, np.ones((1, len(scores_SN))))[0] / len(scores_SN)


def variance_of_mean(scores_SN: np.ndarray) -> np.ndarray:
    """Of each neuron's mean over samples, in float64; NaN from a single one."""
    samples, out = len(scores_SN), np.full(scores_SN.shape[1], np.nan)
    with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN among the scores stay what they are
        for block in _blocks(scores_SN) if samples > 1 else ():
            out[block] = scores_SN[:, block].astype(np.float64).var(0, ddof=1) / samples
    return out


def select(values_N: np.ndarray, count: int, lowest: bool = True) -> np.ndarray:
    """Indices of the lowest or highest values, best first, ties by index."""
    values = np.where(np.isfinite(values_N), values_N if lowest else -values_N, np.inf)
    last = np.partition(values, count - 1)[count - 1] if 0 < count <= len(values) else np.inf
    if last == np.inf:
        raise ValueError(f"{count} of {len(values)} values cannot be selected: {np.isfinite(values).sum()} are finite")
    below = np.flatnonzero(values < last)
    ties = np.flatnonzero(values == last)[: count - len(below)]
    chosen = np.concatenate([below, ties])
    return chosen[np.argsort(values[chosen], kind="stable")]


def overlaps(one: np.ndarray, other: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """|A_n & B_n| / n of the first n of two selections, for every n."""
    rank = {int(index): at for at, index in enumerate(other)}
    both = np.array([max(at, rank.get(int(index), len(other))) for at, index in enumerate(one)])
    return np.array([(both < n).sum() / n for n in sizes])


def resamples(samples: int, count: int, seed: int) -> np.ndarray:
    """[R, S]: how often each resample, drawn with replacement, holds each sample."""
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, samples, (count, samples))
    return np.stack([np.bincount(draw, minlength=samples) for draw in draws])


def bootstrap(
    scores_SN: np.ndarray,
    sizes: Sequence[int],
    *,
    minus_SN: np.ndarray | None = None,
    lowest: bool = True,
    count: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """[R, sizes]: the overlap of each resample's selection with that from all samples.

    `minus_SN`: the difference of the two means is what is selected by, and the samples of both are drawn again."""
    most = max(sizes)
    full = select(_difference(scores_SN, minus_SN, None, None)[0], most, lowest)
    drawn = resamples(len(scores_SN), count, seed)
    drawn_minus = None if minus_SN is None else resamples(len(minus_SN), count, seed + 1)
    found = []
    for at in range(0, count, GROUP):
        mine = drawn[at : at + GROUP]
        theirs = None if drawn_minus is None else drawn_minus[at : at + GROUP]
        for values in _difference(scores_SN, minus_SN, mine, theirs):
            found.append(overlaps(select(values, most, lowest), full, sizes))
    return np.stack(found)


def reference_curve(
    scores_SN: np.ndarray, firsts: Sequence[int], sizes: Sequence[int], lowest: bool = True
) -> np.ndarray:
    """[firsts, sizes]: the overlap of the selection from the first k samples with that from all."""
    weights = np.arange(len(scores_SN))[None] < np.array([*firsts, len(scores_SN)])[:, None]
    picks = [select(values, max(sizes), lowest) for values in _sums(scores_SN, weights)]
    return np.stack([overlaps(pick, picks[-1], sizes) for pick in picks[:-1]])


def between(values: Sequence[np.ndarray], sizes: Sequence[int], lowest: bool = True) -> np.ndarray:
    """[pairs, sizes]: the overlap of the selections of every two of several sets, as of seeds."""
    picks = [select(value, max(sizes), lowest) for value in values]
    pairs = [(a, b) for i, a in enumerate(picks) for b in picks[i + 1 :]]
    return np.array([overlaps(a, b, sizes) for a, b in pairs]).reshape(len(pairs), len(sizes))


def _difference(
    scores_SN: np.ndarray, minus_SN: np.ndarray | None, drawn: np.ndarray | None, drawn_minus: np.ndarray | None
) -> np.ndarray:
    """[R, N]: means over each resample; all samples once where nothing was drawn."""
    drawn = np.ones((1, len(scores_SN))) if drawn is None else drawn
    means = _sums(scores_SN, drawn / len(scores_SN))
    if minus_SN is not None:
        drawn_minus = np.ones((1, len(minus_SN))) if drawn_minus is None else drawn_minus
        means -= _sums(minus_SN, drawn_minus / len(minus_SN))
    return means


def _sums(scores_SN: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """weights @ scores in float64, [R, N], in blocks of neurons."""
    out = np.empty((len(weights_RS), scores_SN.shape[1]))
    wide = weights_RS.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf times a sample that was not drawn
        for block in _blocks(scores_SN):
            out[:, block] = wide @ scores_SN[:, block].astype(np.float64)
    return out


def _blocks(scores_SN: np.ndarray) -> Iterator[slice]:
    step = max(BLOCK_VALUES // len(scores_SN), 1)
    return (slice(at, at + step) for at in range(0, scores_SN.shape[1], step))
