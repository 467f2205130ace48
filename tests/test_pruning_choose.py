"""Choices of neurons: against a full stable sort, plain loops and sets, and intervals against a bootstrap."""

import numpy as np
import pytest

from lib.attribution.stability import mean_over_samples, resamples, variance_of_mean
from lib.attribution.summary import Layer, Sampled
from lib.base.errors import UserError
from lib.pruning.choose import (
    FLOOR,
    agreement,
    by_layer,
    choose,
    contrast,
    difference_interval,
    matched_choice,
    random_choice,
    row_norms,
)

LAYERS = [
    Layer("layers.0.mlp.up_proj", 0, 30),
    Layer("layers.1.self_attn.q_proj", 30, 12),
    Layer("layers.2.fc1", 42, 58),
]
NEURONS = 100


def means(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of general and undesired: many exact ties, signs, a neuron that has no value in one of them."""
    rng = np.random.default_rng(seed)
    general, undesired = rng.integers(-4, 5, NEURONS) / 2, rng.integers(-4, 5, NEURONS) / 2
    general[rng.integers(NEURONS)], undesired[rng.integers(NEURONS)] = np.nan, np.inf
    return general, undesired


def by_hand(kind: str, general: np.ndarray, undesired: np.ndarray, tops: tuple[float, float]) -> list[float]:
    """One block's values, a neuron after another; None of what is never chosen."""
    good = [i for i in range(len(general)) if np.isfinite(general[i])]
    floor = FLOOR * sum(abs(general[i]) for i in good) / len(good)

    def highest(values: np.ndarray, share: float) -> set[int]:
        order = sorted((i for i in range(len(values)) if np.isfinite(values[i])), key=lambda i: (-values[i], i))
        return set(order[: int(share * len(values))])

    keep, drop = highest(general, tops[0]), highest(undesired, tops[1])
    found = []
    for i, (g, u) in enumerate(zip(general, undesired, strict=True)):
        one = {
            "difference": g - u,
            "undesired": -u,
            "ratio": -(u if u > 0 else 0) / (g if g > floor else floor) if i in good else np.nan,
            "set_difference": -u if i in drop - keep and i in good else np.nan,
        }[kind]
        found.append(one if np.isfinite(one) else None)
    return found


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", ["difference", "ratio", "set_difference", "undesired"])
def test_a_choice_is_the_beginning_of_a_full_stable_sort(kind, scope):
    blocks = [range(NEURONS)] if scope == "global" else [range(la.first, la.first + la.outputs) for la in LAYERS]
    for seed in range(20):
        general, undesired = means(seed)
        tops = (0.3, 0.6)
        values = contrast(kind, general, undesired, LAYERS, scope, tops)
        orders = []
        for block in blocks:
            hand = by_hand(kind, general[list(block)], undesired[list(block)], tops)
            orders.append([i for _, i in sorted((v, i) for v, i in zip(hand, block, strict=True) if v is not None)])
        most = min(map(len, orders))
        for count in {0, 1, most // 2, most}:
            want = [order[rank] for rank in range(count) for order in orders]
            assert choose(values, count, LAYERS, scope).tolist() == want
        with pytest.raises(UserError, match=f"{most + 1} neurons.* cannot be chosen: {most} have a value"):
            choose(values, most + 1, LAYERS, scope)


def test_contrasts_order_as_they_promise():
    general, undesired = np.array([1.0, -1.0, 1e-9, 2.0, -3.0]), np.array([2.0, -2.0, 1e-9, 2.0, 0.5])
    layer = [Layer("layers.0.fc1", 0, 5)]
    assert choose(contrast("difference", general, undesired, layer), 2, layer).tolist() == [4, 0]
    assert choose(contrast("undesired", general, undesired, layer), 2, layer).tolist() == [0, 3]  # a tie, by index
    # 2 / 1 goes before 2 / 2; what hurts general text goes first; two negative ones are no important neuron
    assert choose(contrast("ratio", general, undesired, layer), 5, layer).tolist() == [4, 0, 3, 2, 1]


def test_by_layer_names_neurons_inside_their_layers():
    assert {k: v.tolist() for k, v in by_layer(np.array([41, 0, 42, 30, 99]), LAYERS).items()} == {
        "layers.0.mlp.up_proj": [0],
        "layers.1.self_attn.q_proj": [0, 11],
        "layers.2.fc1": [0, 57],
    }
    assert by_layer(np.array([3, 1]), LAYERS).keys() == {"layers.0.mlp.up_proj"}


def test_random_neurons_are_any_and_of_their_seed():
    first, second = random_choice(40, LAYERS, 1), random_choice(40, LAYERS, 2)
    assert len(set(first.tolist())) == 40 and first.min() >= 0 and first.max() < NEURONS
    assert first.tolist() != second.tolist()
    assert first[:7].tolist() == random_choice(7, LAYERS, 1).tolist()
    counts = np.bincount(np.concatenate([random_choice(10, LAYERS, seed) for seed in range(2000)]), minlength=NEURONS)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 0.9)  # each as often as any other
    with pytest.raises(UserError, match="there are 100"):
        random_choice(101, LAYERS, 0)


def test_matched_neurons_are_of_the_same_layers_and_others():
    chosen = choose(contrast("difference", *means(3), LAYERS), 9, LAYERS)
    layer_of = np.searchsorted([la.first for la in LAYERS], np.arange(NEURONS), "right")
    seen = set()
    for seed in range(300):
        other = matched_choice(chosen, LAYERS, seed)
        assert layer_of[other].tolist() == layer_of[chosen].tolist()
        assert len(set(other.tolist())) == 9 and not set(other.tolist()) & set(chosen.tolist())
        seen |= set(other.tolist())
    assert seen == {i for i in range(NEURONS) if layer_of[i] in layer_of[chosen]} - set(chosen.tolist())
    with pytest.raises(UserError, match=r"7 of 12 neurons of layers\.1\.self_attn\.q_proj are chosen"):
        matched_choice(np.arange(30, 37), LAYERS, 0)


def test_magnitude_is_the_norm_of_a_row(monkeypatch):
    monkeypatch.setattr("lib.pruning.choose.BLOCK_VALUES", 20)
    weights = [
        np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate([(9, 6), (4, 7)])
    ]
    want = [sum(float(v) ** 2 for v in row) ** 0.5 for weight in weights for row in weight]
    np.testing.assert_allclose(row_norms(weights), want, rtol=1e-14)


def test_intervals_are_those_of_a_bootstrap_over_samples():
    rng = np.random.default_rng(5)
    general, undesired = (rng.standard_normal((n, 20)) * scale + 1 for n, scale in ((384, 1.0), (93, 3.0)))
    chosen = np.array([3, 17, 4])
    of = [Sampled(mean_over_samples(x), variance_of_mean(x), len(x)) for x in (general, undesired)]
    low, high = difference_interval(*of, chosen)
    draws = [resamples(len(x), 4000, seed) / len(x) @ x[:, chosen] for seed, x in enumerate((general, undesired))]
    want = np.quantile(draws[0] - draws[1], [0.025, 0.975], axis=0)
    np.testing.assert_allclose([low, high], want, atol=0.08 * (high - low).max())


def test_agreement_counts_the_seeds_whose_own_choice_holds_a_neuron():
    choices = [np.array([1, 2, 3]), np.array([3, 9, 1]), np.array([3, 4, 5])]
    assert agreement(np.array([3, 1, 7, 9]), choices).tolist() == [3, 2, 0, 1]


def test_what_cannot_be_meant_is_told():
    general, undesired = means(0)
    for call, says in (
        (
            lambda: contrast("differenz", general, undesired, LAYERS),
            "no contrast is called 'differenz'; there are: diff",
        ),
        (lambda: contrast("ratio", general[1:], undesired, LAYERS), "99 neurons' scores and the other set 100"),
        (lambda: contrast("set_difference", general, undesired, LAYERS, tops=(0, 5)), "between 0 and 1"),
        (lambda: choose(general, 2, LAYERS, "row"), "no scope is called 'row'"),
        (lambda: choose(general[:50], 2, LAYERS), "50 neurons have a value and the layers have 100"),
        (lambda: choose(general, -1, LAYERS), "choose 0 to 99"),
    ):
        with pytest.raises(UserError, match=says):
            call()
