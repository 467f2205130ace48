"""The scoped patch: it changes one model while it lasts, and nothing of it is left behind."""

import pytest
import torch
from lrp_models import FAMILIES, assert_nothing_left, everything, make
from test_attribution_rules import IDS, LRP, gradients, logits, same_bits

from lib.attribution.patch import RULES, patched
from lib.base.errors import UserError

# The scope


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["left", "raised", "recompute"])
def test_nothing_is_left_behind(family: str, rule: str, how: str) -> None:
    model = make(family, **({"dropout": 0.3} if family == "opt" else {"attention_dropout": 0.3}))
    first, before = gradients(model), everything(model)
    if how == "raised":
        with pytest.raises(ZeroDivisionError), patched(model, rule):
            logits(model, IDS).sum().backward()
            raise ZeroDivisionError
        model.zero_grad(set_to_none=True)
    else:
        changed = not same_bits(gradients(model, rule, recompute=how == "recompute"), first)
        assert changed is (rule != "gradient")
    assert_nothing_left(before, everything(model))
    assert same_bits(gradients(model), first)


def test_what_the_check_for_leftovers_sees() -> None:
    model = make("llama")
    before = everything(model)
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_nothing_left(before, everything(model))
    handle.remove()
    assert_nothing_left(before, everything(model))
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    with pytest.raises(AssertionError):
        assert_nothing_left(before, everything(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_of_the_class_are_untouched_meanwhile(family: str) -> None:
    model, other = make(family), make(family, seed=1)
    expected = gradients(other)
    for rule in LRP:
        with patched(model, rule):
            assert same_bits(gradients(other), expected)
        with patched(model, rule), patched(other, rule):  # two scopes beside each other
            both = gradients(other)
        assert same_bits(both, gradients(other, rule))


@pytest.mark.parametrize("rule", LRP)
def test_a_second_patch_on_the_same_model_is_refused(rule: str) -> None:
    model = make("llama")
    expected, before = gradients(model, rule), everything(model)
    with patched(model, rule):
        with pytest.raises(UserError, match="already"), patched(model, "attnlrp"):
            pass
        assert same_bits(gradients(model), expected)  # still this rule, once
    assert_nothing_left(before, everything(model))


def test_what_cannot_be_patched_is_said() -> None:
    model = make("llama")
    for wrong, rule, words in ((model, "attn_lrp", "attnlrp"), (torch.nn.Linear(2, 2), "attnlrp", "Linear")):
        before = None if wrong is not model else everything(model)
        with pytest.raises(UserError, match=words), patched(wrong, rule):
            pass
        if before:
            assert_nothing_left(before, everything(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_is_the_same(family: str, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    with torch.no_grad():
        outside = logits(model, IDS).float()
        for rule in RULES:
            with patched(model, rule):
                inside = logits(model, IDS).float()
            limit = {torch.float32: 1e-6, torch.bfloat16: 0.01 if family == "opt" else 0}[dtype]
            assert (inside - outside).abs().max() <= limit * outside.abs().max()
