"""Attributor against LRP by hand, and what must not change a score: batch, neighbours."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lrp_by_hand import Explained
from lrp_models import (
    FAMILIES,
    by_hand,
    float64_everywhere,
    make,
    sequences,
)
from transformers import PreTrainedModel

from lib.attribution.attribute import Attributor, Scores
from lib.attribution.patch import RULES
from lib.base.errors import UserError

SAMPLES = sequences(5, 12, 9)
GIVEN = [[40, 7], [8, -1], [90, 12]]  # tokens explained at the end of each sample; -1: none
UP = {"llama": "up_proj", "qwen2": "up_proj", "opt": "fc1"}


@pytest.fixture
def all_float64() -> Iterator[None]:
    with float64_everywhere():
        yield


def run(model: PreTrainedModel, samples: list[list[int]] = SAMPLES, targets: object = None, **kw: object) -> Scores:
    return Attributor(model, **kw).run(samples, targets)


def same_bits(a: Scores, b: Scores, rows: tuple[slice, slice] = (slice(None), slice(None))) -> bool:
    parts = [(getattr(a, kind), getattr(b, kind)) for kind in ("signed", "abs", "sumsq")]
    return a.layers == b.layers and all(
        x.keys() == y.keys() and all(torch.equal(x[n][rows[0]], y[n][rows[1]]) for n in x) for x, y in parts
    )


# Against LRP by hand


@pytest.fixture(scope="module")
def hand() -> dict[tuple[str, str, str], list[Explained]]:
    """(family, rule, target) -> each sample explained by hand."""
    found = {}
    for family in FAMILIES:
        with float64_everywhere():
            model = make(family, num_hidden_layers=3).double()
        for rule in RULES:
            for target in ("last", "all", "given"):
                found[family, rule, target] = [by_hand_for(model, rule, target, i) for i in range(len(SAMPLES))]
    return found


def by_hand_for(model: PreTrainedModel, rule: str, target: str, i: int) -> Explained:
    ids = SAMPLES[i]
    if target == "given":
        return by_hand(model, ids, [(len(ids) - 1, token) for token in GIVEN[i] if token >= 0], rule)
    best = by_hand(model, ids, [], rule).logits.argmax(-1)
    return by_hand(
        model, ids, [(t, int(best[t])) for t in range(0 if target == "all" else len(ids) - 1, len(ids))], rule
    )


def expected(e: Explained, name: str, level: str, kind: str) -> np.ndarray:
    relevance = e.weights[f"{name}.weight"] * e.gradient(name)
    if level == "weight":
        return relevance if kind == "signed" else np.abs(relevance)
    return e.relevance(name) if kind == "signed" else np.abs(relevance).sum(1)


@pytest.mark.parametrize("target", ["last", "all", "given"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_by_hand(all_float64: None, hand: dict, family: str, rule: str, target: str) -> None:
    """Both levels, both scores, one kind of layer and all: in batches of two, the last one not full, ragged samples."""
    model = make(family, num_hidden_layers=3).double()
    by = hand[family, rule, target]
    for level in ("neuron", "weight"):
        for layers, count in (((UP[family],), 1), ("all", 6 if family == "opt" else 7)):
            targets = GIVEN if target == "given" else None
            found = run(model, targets=targets, rule=rule, target=target, level=level, layers=layers, batch=2)
            assert len(found.layers) == 3 * count and found.nonfinite() == {}
            for name in found.layers:
                for kind in ("signed", "abs"):
                    rows = np.stack([expected(e, name, level, kind) for e in by])
                    want = rows if level == "neuron" else rows.sum(0)
                    ours = getattr(found, kind)[name].numpy()
                    assert ours.shape == want.shape
                    assert np.abs(ours - want).max() <= 1e-9 * np.abs(want).max(), (name, kind)
            assert found.tokens.tolist() == [len(s) for s in SAMPLES]
            assert found.logit.numpy() == pytest.approx([logit(e, i, target) for i, e in enumerate(by)], rel=1e-9)


def logit(e: Explained, i: int, target: str) -> float:
    if target == "given":
        return sum(e.logits[-1, token] for token in GIVEN[i] if token >= 0)
    return e.logits.max(-1)[slice(None) if target == "all" else slice(-1, None)].sum()


def test_layers_stand_in_forward_order_and_under_full_names() -> None:
    found = run(make("llama"), layers="all").layers
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    order += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert found == [f"model.layers.{i}.{name}" for i in range(2) for name in order]


# Targets


def test_the_stored_target_pins_the_same_scores() -> None:
    """What one run found as its targets, given to another, gives the same scores bit for bit."""
    for family in FAMILIES:
        model = make(family)
        for target in ("last", "all"):
            first = run(model, target=target, layers="all")
            assert same_bits(first, run(model, target=target, targets=first.target, layers="all"))
    best = [by_hand(model, ids, [], "gradient").logits[-1].argmax() for ids in SAMPLES]
    assert run(model, layers="all").target.flatten().tolist() == best


def test_a_pad_position_is_never_explained() -> None:
    model = make("llama")
    alone, padded = (run(model, [SAMPLES[0]], target="all", width=width) for width in (len(SAMPLES[0]), 32))
    assert (padded.target[0, len(SAMPLES[0]) :] == -1).all()
    assert padded.target[0, : len(SAMPLES[0])].tolist() == alone.target[0].tolist()
    assert padded.logit.item() == pytest.approx(alone.logit.item(), rel=1e-6)


# Batches


def near(a: Scores, b: Scores, rows: list[int], tolerance: float) -> None:
    for kind in ("signed", "abs", "sumsq"):
        for name, value in getattr(a, kind).items():
            size = value[rows].abs().max()
            assert (value[rows] - getattr(b, kind)[name]).abs().max() <= tolerance * size, (kind, name)


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_and_padded_equals_one_by_one(family: str, rule: str) -> None:
    model, kw = make(family), {"rule": rule, "layers": "all", "wanda": True}
    together = run(model, **kw, batch=3, width=40)
    for i, sample in enumerate(SAMPLES):
        near(together, run(model, [sample], **kw, batch=1, width=len(sample)), [i], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_change_no_bit(family: str) -> None:
    """With the batch's shape fixed, a row is the same whoever stands beside it, and in whichever run."""
    model, kw = make(family), {"layers": "all", "wanda": True, "batch": 2, "width": 16}
    samples = sequences(5, 12, 9, 16, 1, seed=3)
    whole = run(model, samples, **kw)
    assert same_bits(whole, run(model, samples[2:], **kw), (slice(2, None), slice(None)))
    other = [samples[0], *sequences(14, seed=8)]
    assert same_bits(whole, run(model, other, **kw), (slice(0, 1), slice(0, 1)))
    assert same_bits(whole, run(model, samples[:1], **kw), (slice(0, 1), slice(None)))


def test_weight_level_sums_add_up_over_blocks() -> None:
    model, kw = make("qwen2"), {"layers": "all", "level": "weight"}
    samples = sequences(5, 12, 9, 7, seed=3)
    whole, *parts = (run(model, part, **kw, batch=2, width=16) for part in (samples, samples[:2], samples[2:]))
    for kind in ("signed", "abs"):
        for name, value in getattr(whole, kind).items():
            total = sum(getattr(part, kind)[name] for part in parts)
            assert (value - total).abs().max() <= 1e-6 * value.abs().max(), (kind, name)
        assert getattr(whole, kind)


def test_several_batches_in_flight_change_no_bit() -> None:
    """As over several devices, where batches overlap so that all are busy."""
    model = make("llama")
    for level in ("neuron", "weight"):
        plain = Attributor(model, layers="all", level=level, batch=1, width=16, wanda=True)
        flight = Attributor(model, layers="all", level=level, batch=1, width=16, wanda=True)
        flight.devices = flight.devices * 2
        assert same_bits(plain.run(SAMPLES), flight.run(SAMPLES))


# Wanda


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_is_the_norm_of_all_inputs_concatenated(family: str) -> None:
    """Alone, beside LRP, at either level: the same, padding left out; and the official code's running mean."""
    model, inputs = make(family), {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0].flatten(0, -2)))
        for n, m in linears.items()
    ]
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=torch.tensor([sample]), use_cache=False)
    for hook in hooks:
        hook.remove()
    alone = run(model, layers="all", scores=(), wanda=True, batch=3, width=24)
    assert set(alone.sumsq) == set(linears) and not alone.signed and not alone.abs
    for name, seen in inputs.items():
        assert alone.sumsq[name].shape == (len(SAMPLES), linears[name].in_features)
        norm = torch.cat(seen).norm(dim=0)
        torch.testing.assert_close(alone.sumsq[name].sum(0).sqrt(), norm, rtol=1e-5, atol=1e-6)
        official = torch.zeros_like(norm)
        for n, x in enumerate(seen):
            official = official * n / (n + 1) + x.norm(dim=0) ** 2 / (n + 1)
        torch.testing.assert_close(alone.sumsq[name].mean(0), official, rtol=1e-5, atol=1e-6)
    for kw in ({"rule": "gradient"}, {"rule": "attnlrp"}, {"rule": "cp_lrp"}, {"rule": "attnlrp", "level": "weight"}):
        beside = run(model, layers="all", wanda=True, batch=3, width=24, **kw)
        for name in linears:  # LayerNorm under a rule is summed in another order
            size = 0 if family != "opt" or kw["rule"] == "gradient" else 1e-5 * alone.sumsq[name].max()
            assert (beside.sumsq[name] - alone.sumsq[name]).abs().max() <= size, (kw, name)


# What is refused


@pytest.mark.parametrize(
    "kw,words",
    [
        ({"rule": "lrp"}, "lrp"),
        ({"layers": ("up_prj",)}, "up_proj"),
        ({"layers": ("lm_head",)}, "lm_head"),
        ({"level": "row"}, "level"),
        ({"target": "first"}, "target"),
        ({"scores": ("squared",)}, "scores"),
        ({"scores": ()}, "scores"),
        ({"target": "given"}, "given"),
        ({"rule": "cp_lrp", "layers": ("q_proj", "gate_proj")}, "no relevance: name other layers, or another rule"),
        ({"targets": [1, 2]}, "2 targets for 3 samples"),
        ({"samples": []}, "no sample"),
        ({"samples": [[3, 4], []]}, "without a token"),
    ],
)
def test_what_makes_no_sense_is_refused(kw: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(make("llama"), **kw)
