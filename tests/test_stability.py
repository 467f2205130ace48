"""Stability of selections: against plain loops, sets and sorting; draws that are numpy's own; memory that stays."""

import tracemalloc

import numpy as np
import pytest

from lib.attribution import stability
from lib.attribution.stability import (
    between,
    bootstrap,
    mean_over_samples,
    overlaps,
    reference_curve,
    resamples,
    select,
)

SIZES = (1, 3, 10, 40)


def scores(samples: int = 9, neurons: int = 300, seed: int = 0, signal: float = 1.0) -> np.ndarray:
    """Noisy samples of neurons with means of their own; every tenth neuron is dead: exact ties at 0."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((samples, neurons)) + signal * rng.standard_normal(neurons)
    found[:, ::10] = 0
    return found.astype(np.float32)


def by_sorting(values: np.ndarray, count: int, lowest: bool) -> list[int]:
    sign = 1 if lowest else -1
    good = [i for i in range(len(values)) if np.isfinite(values[i])]
    return sorted(good, key=lambda i: (sign * values[i], i))[:count]


def by_sets(one: list[int], other: list[int]) -> list[float]:
    return [len(set(one[:n]) & set(other[:n])) / n for n in SIZES]


@pytest.mark.parametrize("lowest", [True, False])
def test_selection_is_by_value_then_index_and_never_nan(lowest):
    rng = np.random.default_rng(3)
    for trial in range(200):
        values = rng.integers(-3, 4, 40).astype(float)
        values[rng.random(40) < 0.2] = [np.nan, np.inf, -np.inf][trial % 3]
        count = int(rng.integers(1, np.isfinite(values).sum() + 1))
        assert select(values, count, lowest).tolist() == by_sorting(values, count, lowest)
    for bad in (0, 41, 40):
        with pytest.raises(ValueError, match="cannot be selected"):
            select(np.where(np.arange(40) == 7, np.nan, 1.0), bad, lowest)


def test_overlap_is_that_of_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.permutation(60)[: SIZES[-1]].tolist() for _ in range(2))
        assert overlaps(np.array(one), np.array(other), SIZES).tolist() == by_sets(one, other)


def test_resamples_are_draws_with_replacement_from_a_seed():
    drawn = resamples(7, 50, 4)
    assert drawn.shape == (50, 7) and (drawn.sum(1) == 7).all() and (drawn == resamples(7, 50, 4)).all()
    assert (drawn != resamples(7, 50, 5)).any() and drawn.max() > 1
    assert abs(resamples(7, 4000, 0).mean(0) - 1).max() < 0.05


@pytest.mark.parametrize("lowest", [True, False])
@pytest.mark.parametrize("difference", [False, True])
def test_bootstrap_against_a_loop(monkeypatch, lowest, difference):
    one, minus = scores(9), scores(6, seed=5) if difference else None
    draw = np.random.Generator(np.random.PCG64(11)).integers(0, 9, (35, 9))
    draw_minus = np.random.Generator(np.random.PCG64(12)).integers(0, 6, (35, 6))

    def pick(rows, rows_minus) -> list[int]:
        values = one[rows].astype(np.float64).mean(0)
        return by_sorting(values - minus[rows_minus].astype(np.float64).mean(0) if difference else values, 40, lowest)

    full = pick(np.arange(9), np.arange(6))
    want = [by_sets(pick(a, b), full) for a, b in zip(draw, draw_minus, strict=True)]
    for group, block in ((16, 1 << 22), (1, 100), (50, 9)):
        monkeypatch.setattr(stability, "GROUP", group)
        monkeypatch.setattr(stability, "BLOCK_VALUES", block)
        found = bootstrap(one, SIZES, minus_SN=minus, lowest=lowest, count=35, seed=11)
        np.testing.assert_allclose(found, want, atol=1e-12)
    assert 0.1 < found.mean() < 0.95


def test_a_neuron_with_one_broken_sample_is_never_selected():
    one = scores()
    one[:, 17] = -100
    assert 17 in select(mean_over_samples(one), 1)
    for broken in (np.nan, np.inf, -np.inf):
        one[3, 17] = broken
        assert 17 not in select(mean_over_samples(one), 40) and np.isfinite(bootstrap(one, SIZES, count=5)).all()


def test_signal_is_stable_and_noise_is_not():
    clear = bootstrap(scores(50, 2000, signal=100.0), SIZES, count=20)
    noise = bootstrap(scores(50, 2000, signal=0.0), SIZES, count=20)
    assert clear.mean() > 0.9 > 0.6 > noise.mean()


def test_curve_of_reference_sizes_against_a_loop():
    one, firsts = scores(12), [1, 4, 11, 12]
    full = by_sorting(one.astype(np.float64).mean(0), 40, True)
    want = [by_sets(by_sorting(one[:k].astype(np.float64).mean(0), 40, True), full) for k in firsts]
    found = reference_curve(one, firsts, SIZES)
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert (found[-1] == 1).all() and found[0].mean() < 0.9


def test_between_every_two_seeds():
    means = [mean_over_samples(scores(seed=seed)) for seed in range(3)]
    picks = [by_sorting(mean, 40, False) for mean in means]
    want = [by_sets(picks[a], picks[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(between(means, SIZES, lowest=False), want)
    assert between(means[:1], SIZES).shape == (0, len(SIZES))


def test_means_are_in_float64():
    one = np.full((3, 2), 1e8, np.float32)
    one[0] = 1
    assert mean_over_samples(one).tolist() == [(2e8 + 1) / 3] * 2


def test_memory_is_bounded_by_a_group_of_resamples():
    """400 resamples of 60,000 neurons would be 192 MB at once."""
    one = scores(8, 60_000)
    tracemalloc.start()
    bootstrap(one, SIZES, count=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6
