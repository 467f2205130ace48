"""The rules put into one model instance for the length of a `with`; on leaving, everything is as before.

Nothing global is touched: neither classes nor the table of attention functions. The rule for attention needs no hold
on the attention function itself: dividing the gradient of q and k by 4 and of v by 2 can be done where the projections
put them out, because rope is linear; so eager, sdpa and flash attention all obey it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.attribution.rules import FACTORS, Identity, Linears, Scale, Tap, gated, kernels, layer_norm, rms_norm
from lib.base.errors import UserError, nearest
from lib.checkpoint.families import NO_RULES, Family, family_of, last
from lib.checkpoint.layers import choose

RULES = tuple(FACTORS)
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
    family = explained_family(model)
    if model in _patched:
        raise UserError("this model is already inside a patched scope; leave that one first")
    if any(p.is_meta for p in model.parameters()):
        raise UserError("weights of this model are offloaded: load it onto its devices whole")
    must_be_plain(model)
    with ExitStack() as undo:
        _patched.add(model)
        undo.callback(_patched.discard, model)
        for module in model.modules():
            for name in DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    _set(undo, module, name, 0.0)
        scope = Scope(rule, family, {model.get_submodule(name): tap for name, tap in (taps or {}).items()})
        for linear in scope.taps:
            if any(p.requires_grad for p in linear.parameters()):
                raise UserError("a tapped layer's weights get no gradient: freeze them (requires_grad_(False))")
            _set(undo, linear, "forward", partial(_tapped, linear, scope))
        for module in model.modules():
            _rules(undo, module, scope)
        if recompute:
            for layer in decoder_layers(model):
                _set(undo, layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
        yield


def explained_family(model: nn.Module) -> Family:
    """The model's family, one that has rules."""
    return family_of(getattr(getattr(model, "config", None), "model_type", type(model).__name__), NO_RULES)


def must_be_plain(model: Any) -> None:
    """The rules compute linear layers, norms and MLPs by their weights: whatever else such a module would do is not in
    the result, so it must do nothing else."""
    if type(model).__module__.startswith("peft."):
        raise UserError("the model is wrapped by peft: merge the adapter (merge_and_unload) and use what that returns")
    head, family = model.get_output_embeddings(), explained_family(model)
    q, gate, activation = last(family.linears.q), last(family.linears.gate or family.linears.up), family.activation
    for name, module in model.named_modules():
        linear, acts = isinstance(module, nn.Linear), bool(family.linears.gate) and last(name) == activation
        if (linear or last(name) in family.linears.order or module is head) and type(module) is not nn.Linear:
            raise UserError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, not torch's own Linear, and would be "
                "explained without what that adds: merge adapters into the weights (peft: merge_and_unload), load the "
                "model unquantised, or remove the parametrization"
            )
        known = linear or acts or "Norm" in type(module).__name__ or hasattr(module, gate)
        if (known or hasattr(module, q)) and _replaced(module):
            raise UserError(f"{name} has a forward of its own, which would not be run; put the class's back first")
        if acts and hooks(module):
            raise UserError(f"{name} has a hook, which would not be run; remove it first, or hook what calls it")


def _replaced(module: nn.Module) -> bool:
    """Whether this instance's forward is not its class's. accelerate's hooks only move tensors."""
    now = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return now is not None and getattr(now, "__func__", None) is not type(module).forward


def hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


@dataclass(frozen=True)
class Scope:
    rule: str
    family: Family
    taps: dict[Any, Tap]  # by linear layer
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers, wherever the family keeps it."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's layers, in forward order; embedding and output head are not among them."""
    inside = {id(m) for m in decoder_layers(model).modules()}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    return {name: found[name] for name in choose(explained_family(model), found, "all")}


def _rules(undo: ExitStack, module: Any, scope: Scope) -> None:
    family, kind = scope.family, type(module).__name__
    if all(_part(module, name) for name in (family.linears.q, family.linears.k, family.linears.v)):
        fused = family.fused_attention and kind == f"{family.classes}Attention"
        known = fused and kernels(_part(module, family.linears.q).weight)
        if known or scope.rule != "gradient":  # of the gradient itself: so that it adds up in a fixed order
            plain = partial(_scaled_attention, module, module.forward, scope)
            _set(undo, module, "forward", partial(_whole_attention, module, plain, scope) if known else plain)
    elif scope.rule == "gradient":
        return
    elif kind == f"{family.classes}RMSNorm":
        _set(undo, module, "forward", partial(_rms_forward, module))
    elif isinstance(module, nn.LayerNorm):
        _set(undo, module, "forward", partial(_layer_norm_forward, module))
    elif family.linears.gate and _part(module, family.linears.gate) and _part(module, family.linears.down):
        _set(undo, module, "forward", partial(_mlp_forward, module, scope))
    elif isinstance(act := getattr(module, family.activation, None), nn.Module) and not isinstance(act, nn.ReLU):
        _set(undo, act, "forward", partial(_identity, act.forward))  # OPT's relatives without ReLU


def _part(module: nn.Module, name: str) -> Any:
    """A linear layer of this module, by its family's name; None where it is not one of its."""
    return getattr(module, last(name), None)


def _set(undo: ExitStack, thing: Any, name: str, value: Any) -> None:
    """An attribute of this instance, put back as it was: to its value, or to not being there."""
    if name in vars(thing):
        undo.callback(setattr, thing, name, vars(thing)[name])
    else:
        undo.callback(delattr, thing, name)
    setattr(thing, name, value)


def _tapped(linear: nn.Linear, scope: Scope, x: torch.Tensor) -> torch.Tensor:
    return Linears.apply(x, scope.anchor, (scope.taps[linear],), linear.weight, linear.bias)[0]


def _project(linears: Sequence[Any], scope: Scope, x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Layers that read the same input: as one function, unless somebody listens to one, or its weights learn."""
    plain = not torch.is_grad_enabled() or any(map(hooks, linears))
    if plain or any(p.requires_grad for m in linears for p in m.parameters()):
        return [linear(x) for linear in linears]
    taps = tuple(scope.taps.get(linear) for linear in linears)
    anchor = scope.anchor if any(taps) else scope.anchor.detach()
    return Linears.apply(x, anchor, taps, *(p for linear in linears for p in (linear.weight, linear.bias)))


def _rms_forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _layer_norm_forward(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def _mlp_forward(mlp: Any, scope: Scope, x: torch.Tensor) -> torch.Tensor:
    linears, act = scope.family.linears, getattr(mlp, scope.family.activation)
    gate, up = _project((_part(mlp, linears.gate or ""), _part(mlp, linears.up)), scope, x)
    return _part(mlp, linears.down)(gated(gate, up, act) if scope.rule == "attnlrp" else act(gate.detach()) * up)


def _identity(act: Any, x: torch.Tensor) -> torch.Tensor:
    return Identity.apply(x, act)


def _scaled_attention(attn: Any, original: Any, scope: Scope, *args: Any, **kwargs: Any) -> Any:
    """The model's own attention; the factors where q, k, v leave their projections (norms of heads have a constant
    divisor, so they pass a factor on as rope does)."""
    (qk, value), linears = FACTORS[scope.rule], scope.family.linears
    with ExitStack() as hooks:
        for name, factor in ((linears.q, qk), (linears.k, qk), (linears.v, value)):
            if factor != 1:
                hooks.callback(_part(attn, name).register_forward_hook(partial(_scaled, factor)).remove)
        return original(*args, **kwargs)


def _scaled(factor: float, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return Scale.apply(out, factor) if factor else out.detach()


def _whole_attention(
    attn: Any,
    plain: Any,
    scope: Scope,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """Llama's and Qwen2's attention with rope and factors in one function, where only causality hides a token."""
    from lib.attribution.attention import RopeAttention, supports

    window = getattr(attn, "sliding_window", None)
    if attention_mask is not None or past_key_values is not None or window is not None or not supports(attn.head_dim):
        return plain(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **more,
        )
    heads = (*hidden_states.shape[:-1], -1, attn.head_dim)
    q, k, v = (y.view(heads) for y in _project((attn.q_proj, attn.k_proj, attn.v_proj), scope, hidden_states))
    out = RopeAttention.apply(q, k, v, *position_embeddings, attn.scaling, scope.rule)
    return attn.o_proj(out.flatten(2)), None
