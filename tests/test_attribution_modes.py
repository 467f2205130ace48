"""What must not change a score, or be named where it does: recomputing, train mode, half precision, infinities."""

import numpy as np
import pytest
import torch
from lrp_models import FAMILIES, VOCAB, assert_nothing_left, everything, make, prune, sequences
from test_attribution_scores import SAMPLES, run, same_bits

from lib.attribution.attribute import Scores
from lib.attribution.patch import decoder_layers
from lib.base.errors import UserError

# Modes of the model


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_and_train_mode_change_no_bit(family: str) -> None:
    model = make(family, **({"dropout": 0.5} if family == "opt" else {"attention_dropout": 0.5}))
    kw = {"layers": "all", "wanda": True}
    expected, alone = run(model, **kw), run(model, **kw, scores=())
    assert same_bits(expected, run(model, **kw, recompute=True))
    model.train()
    assert same_bits(expected, run(model, **kw)) and same_bits(alone, run(model, **kw, scores=()))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert same_bits(expected, run(model, **kw))
    assert model.training


def test_recomputing_keeps_less() -> None:
    model, kept = make("llama", num_hidden_layers=4), []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(model, sequences(60), layers=("down_proj",), recompute=recompute)
        kept.append(sum(sizes.values()))
    assert 0 < kept[1] < kept[0]


def test_rows_never_outgrow_the_models_positions() -> None:
    """OPT looks positions up: 60 tokens would be rounded up to 64, and it has 62."""
    model = make("opt", max_position_embeddings=62)
    assert run(model, sequences(60), layers=("fc1",)).nonfinite() == {}
    with pytest.raises(UserError, match="63 tokens; a batch's rows, or the model's positions, are 62"):
        run(model, sequences(63), layers=("fc1",))


def test_nothing_is_left_behind() -> None:
    for family in FAMILIES:
        model = make(family)
        model.get_input_embeddings().weight.requires_grad_(False)
        before = everything(model)
        for kw in ({}, {"scores": (), "wanda": True}, {"level": "weight", "recompute": True}):
            run(model, **kw, layers="all")
            assert_nothing_left(before, everything(model))
        with pytest.raises(UserError, match="12 tokens; a batch's rows"):
            run(model, width=8, layers="all")
        with pytest.raises(UserError, match="token 100 is none of the model's 97"):
            run(model, [[VOCAB + 3]], layers="all")
        assert_nothing_left(before, everything(model))
        failing = decoder_layers(model)[1].register_forward_hook(lambda *_: 1 // 0)
        before = everything(model)
        with pytest.raises(ZeroDivisionError):
            run(model, layers="all")
        assert_nothing_left(before, everything(model))
        failing.remove()


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_with_pruned_neurons(family: str, dtype: torch.dtype) -> None:
    """Targets pinned, half precision's scores go with float32's; a gate of exactly 0 gives no NaN."""
    model = make(family)
    prune(model)
    wide = run(model, layers="all", wanda=True)
    half = run(model.to(dtype), targets=wide.target, layers="all", wanda=True)
    assert half.nonfinite() == {}
    for kind in ("signed", "abs", "sumsq"):
        for name, value in getattr(wide, kind).items():
            assert getattr(half, kind)[name].dtype == torch.float32
            both = torch.stack([value.flatten(), getattr(half, kind)[name].flatten()])
            assert torch.corrcoef(both)[0, 1] > 0.99, (kind, name)


@pytest.mark.parametrize("level", ["neuron", "weight"])
def test_nan_is_counted_and_named(level: str) -> None:
    """One weight that is NaN: every layer it reaches is named with its count, and no NaN has become a number."""
    model = make("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[4, 2] = torch.nan
    found = run(model, [[5, 6, 7], [8, 9]], layers=("up_proj",), level=level, wanda=True)
    name, after = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"
    assert found.nonfinite() == counted(found) and {name, after} <= counted(found).keys()
    assert found.signed[name].isnan().any() and found.abs[name].isnan().any()
    assert found.sumsq[after].isnan().all() and found.sumsq[name].isfinite().all()
    assert not found.logit.isfinite().all()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[4, 2] = 0
    assert run(model, [[5, 6, 7], [8, 9]], layers=("up_proj",), level=level).nonfinite() == {}


def test_infinity_is_counted_and_named() -> None:
    """Too large to be squared in float32: only the statistic overflows."""
    model = make("opt", num_hidden_layers=1)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[3] = 1e25
        model.model.decoder.layers[0].fc2.weight[:, 3] = 0
    found = run(model, layers=("fc1", "fc2"), wanda=True)
    assert found.nonfinite() == counted(found) == {"model.decoder.layers.0.fc2": len(SAMPLES)}
    assert found.sumsq["model.decoder.layers.0.fc2"][:, 3].isinf().all()


def counted(found: Scores) -> dict[str, int]:
    parts = [part for part in (found.signed, found.abs, found.sumsq) if part]
    counts = {n: sum(int(np.sum(~np.isfinite(part[n].numpy()))) for part in parts) for n in found.layers}
    return {name: count for name, count in counts.items() if count}
