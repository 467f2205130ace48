"""What the rules would pass by is refused and named; what they honour gives what the model itself gives."""

from types import MethodType

import pytest
import torch
from lrp_models import make, sequences
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from lib.attribution.attribute import Attributor
from lib.attribution.patch import RULES, patched
from lib.base.errors import UserError

IDS = torch.tensor(sequences(9))


def adapted(targets: list[str]) -> nn.Module:
    """Llama with an adapter that changes its logits by much."""
    model = get_peft_model(make("llama"), LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def refused(model: nn.Module, says: str) -> None:
    for rule in RULES:
        with pytest.raises(UserError, match=says), patched(model, rule):
            pass
    with pytest.raises(UserError, match=says):
        Attributor(model)


@pytest.mark.parametrize("target", ["up_proj", "q_proj", "down_proj", "lm_head"])
def test_an_adapter_is_refused_until_it_is_merged(target):
    model = adapted([target])
    inner = model.base_model.model
    plain, ours = make("llama")(IDS).logits, model(IDS).logits
    assert (ours - plain).abs().max() > 0.5
    refused(model, "wrapped by peft: merge the adapter")
    refused(inner, rf"{target} is a peft\.tuners\.lora\.layer\.Linear, not torch's own Linear")
    merged = model.merge_and_unload()
    with patched(merged):
        torch.testing.assert_close(merged(IDS).logits, ours, atol=2e-4, rtol=1e-4)
    scores = Attributor(merged).run(IDS.tolist())
    torch.testing.assert_close(scores.logit[0], ours[0, -1].max(), atol=2e-4, rtol=1e-4)


def test_prompts_in_front_are_refused_too():
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    refused(get_peft_model(make("llama"), config), "wrapped by peft")


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def subclass(layer: nn.Module) -> None:
    layer.mlp.up_proj.__class__ = Doubled


def parametrized(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer.mlp.up_proj, "weight", Twice())


def on_an_instance(where: str):
    def change(layer: nn.Module) -> None:
        module = layer.get_submodule(where)
        own = module.forward
        module.forward = MethodType(lambda self, *args, **kw: own(*args, **kw), module)

    return change


OTHERS = {
    "subclass": (subclass, r"layers\.1\.mlp\.up_proj is a .*Doubled"),
    "parametrized": (parametrized, r"layers\.1\.mlp\.up_proj is a .*ParametrizedLinear"),
    **{
        where: (on_an_instance(where), rf"layers\.1\.{where} has a forward of its own")
        for where in ("mlp.up_proj", "self_attn.q_proj", "self_attn", "mlp", "mlp.act_fn", "input_layernorm")
    },
    "hook": (lambda layer: layer.mlp.act_fn.register_forward_hook(lambda *_: None), "act_fn has a hook"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_module_that_does_more_than_its_weights_is_named(what):
    model = make("llama")
    change, says = OTHERS[what]
    change(model.model.layers[1])
    refused(model, says)


def test_a_hook_on_the_head_is_refused_where_the_head_is_not_run():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(UserError, match="output head has a hook"):
        Attributor(model)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("last", ["up_proj", "q_proj", "down_proj"])
def test_hooks_on_linear_layers_are_run(rule, last):
    """A hook that changes what a layer puts out is heard by the patched model as by the model itself."""
    model = make("llama")
    linear = next(
        m
        for n, m in model.named_modules()
        if n.endswith(f"layers.1.{'self_attn' if last == 'q_proj' else 'mlp'}.{last}")
    )
    plain = model(IDS).logits
    seen: list[int] = []
    linear.register_forward_hook(lambda module, args, out: 1.5 * out)
    linear.register_full_backward_hook(lambda *_: seen.append(1))
    ours = model(IDS).logits
    assert (ours - plain).abs().max() > 0.1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    with patched(model, rule):
        got = model(IDS).logits
        got[0, -1].max().backward()
    torch.testing.assert_close(got, ours, atol=2e-5, rtol=1e-4)
    assert len(seen) == (0 if (rule, last) == ("cp_lrp", "q_proj") else 1)  # that one gets no gradient at all
    if (rule, last) == ("cp_lrp", "q_proj"):
        return
    logit = Attributor(model, rule=rule, layers=[last]).run(IDS.tolist()).logit[0]
    torch.testing.assert_close(logit, ours[0, -1].max(), atol=2e-5, rtol=1e-4)
