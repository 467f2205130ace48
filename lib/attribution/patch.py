"""The rules put into one model instance for the length of a `with`; on leaving, everything is as before.

Nothing global is touched: neither classes nor the table of attention functions. The rule for attention needs no hold
on the attention function itself: dividing the gradient of q and k by 4 and of v by 2 can be done where the projections
put them out, because rope is linear; so eager, sdpa and flash attention all obey it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.attribution.rules import FACTORS, Scale, Tap, TappedLinear, gated, kernels, layer_norm, rms_norm
from lib.errors import UserError, nearest
from lib.layers import choose

RULES = ("attnlrp", "cp_lrp", "gradient")
FAMILIES = ("llama", "qwen2", "opt")
DROPOUTS = ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop")

_patched: WeakSet[nn.Module] = WeakSet()


@contextmanager
def patched(
    model: nn.Module,
    rule: str = "attnlrp",
    taps: Mapping[str, Tap] | None = None,
    recompute: bool = False,
) -> Iterator[None]:
    """Inside, gradients of `model` follow the rule; dropout is off, whatever the mode.

    taps       name of a linear layer -> who is told what passes through it, once each backward pass
    recompute  keep only each layer's input and compute the rest again in the backward pass"""
    if rule not in RULES:
        raise UserError(f"rule '{rule}' is not one of {', '.join(RULES)}{nearest(rule, list(RULES))}")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UserError(f"model type '{family}' has no rules here: {', '.join(FAMILIES)} have")
    if model in _patched:
        raise UserError("this model is already inside a patched scope; leave that one first")
    if any(p.is_meta for p in model.parameters()):
        raise UserError("weights of this model are offloaded: load it onto its devices whole")
    with ExitStack() as undo:
        _patched.add(model)
        undo.callback(_patched.discard, model)
        for module in model.modules():
            for name in DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    _set(undo, module, name, 0.0)
        for module in model.modules():
            if rule != "gradient":
                _rules(undo, module, rule)
            elif _is_attention(module):
                _attention(undo, module, rule)  # the gradient itself, added up in a fixed order
        anchor = torch.zeros((), requires_grad=True)
        for name, tap in (taps or {}).items():
            linear = model.get_submodule(name)
            _set(undo, linear, "forward", partial(_tapped, linear, anchor, tap))
        if recompute:
            for layer in decoder_layers(model):
                _set(undo, layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
        yield


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers, wherever the family keeps it."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's layers, in forward order; embedding and output head are not among them."""
    inside = {id(m) for m in decoder_layers(model).modules()}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    return {name: found[name] for name in choose(found, "all")}


def _rules(undo: ExitStack, module: nn.Module, rule: str) -> None:
    if type(module).__name__.endswith("RMSNorm"):
        _set(undo, module, "forward", partial(_rms_forward, module))
    elif isinstance(module, nn.LayerNorm):
        _set(undo, module, "forward", partial(_layer_norm_forward, module))
    elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        _set(undo, module, "forward", partial(_mlp_forward, module, rule))
    elif _is_attention(module):
        _attention(undo, module, rule)


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj"))


def _attention(undo: ExitStack, module: Any, rule: str) -> None:
    """The factors where q, k, v leave their projections, or, on a GPU, in one function with rope and attention."""
    whole = [False]  # whether that function is at work: it has the factors itself
    qk, v = FACTORS[rule]
    for linear, factor in ((module.q_proj, qk), (module.k_proj, qk), (module.v_proj, v)):
        if factor != 1:
            undo.callback(linear.register_forward_hook(partial(_scaled, factor, whole)).remove)
    if type(module).__name__ in ("LlamaAttention", "Qwen2Attention") and kernels(module.q_proj.weight):
        _set(undo, module, "forward", partial(_attention_forward, module, module.forward, rule, whole))


def _set(undo: ExitStack, thing: Any, name: str, value: Any) -> None:
    """An attribute of this instance, put back as it was: to its value, or to not being there."""
    if name in vars(thing):
        undo.callback(setattr, thing, name, vars(thing)[name])
    else:
        undo.callback(delattr, thing, name)
    setattr(thing, name, value)


def _scaled(factor: float, whole: list[bool], module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    if whole[0]:
        return out
    return Scale.apply(out, factor) if factor else out.detach()


def _tapped(linear: nn.Linear, anchor: torch.Tensor, tap: Tap, x: torch.Tensor) -> torch.Tensor:
    return TappedLinear.apply(x, linear.weight, linear.bias, anchor, tap)


def _rms_forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _layer_norm_forward(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def _mlp_forward(mlp: Any, rule: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product: Callable[..., torch.Tensor] = gated
    return mlp.down_proj(product(gate, up, mlp.act_fn) if rule == "attnlrp" else mlp.act_fn(gate.detach()) * up)


def _attention_forward(
    attn: Any,
    original: Any,
    rule: str,
    whole: list[bool],
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """Llama's and Qwen2's attention in one function, where nothing but causality hides a token."""
    from lib.attribution.attention import RopeAttention, supports

    plain = attention_mask is None and past_key_values is None and getattr(attn, "sliding_window", None) is None
    if not plain or not supports(attn.head_dim):
        return original(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **more,
        )
    heads = (*hidden_states.shape[:-1], -1, attn.head_dim)
    whole[0] = True
    try:
        q, k, v = (linear(hidden_states).view(heads) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    finally:
        whole[0] = False
    out = RopeAttention.apply(q, k, v, *position_embeddings, attn.scaling, rule)
    return attn.o_proj(out.flatten(2)), None
