"""LRP's rules as modified gradients, so that relevance = value times gradient (the efficient form that lxt uses).

Linear layers keep their gradient (LRP-0). What is changed: normalisation (its divisor counts as a constant), gated
products (relevance is split evenly between the branches, an activation passes act(x)/x) and attention (patch.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lib.models.plain_ops import accurate

# Of the gradients at q and k, and at v.
FACTORS = {"attnlrp": (0.25, 0.5), "cp_lrp": (0.0, 1.0), "gradient": (1.0, 1.0)}


@dataclass(frozen=True)
class Tap:
    """What is told about a linear layer in each backward pass: call(input, output, output's gradient)."""

    call: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], None]
    output: bool = True  # keep the output for it; else it gets None


def kernels(x: torch.Tensor) -> Any | None:
    """The fused kernels, where x can use them."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        from lib.attribution import fused

        return fused
    return None


class Scale(torch.autograd.Function):
    """The value as it is, its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx * ctx.factor, None


class Linears(torch.autograd.Function):
    """Linear layers that read the same input; each may have a tap. Frozen weights: only the input gets a gradient, and
    the parts of it are added up inside the products.

    `anchor` requires a gradient and gets none: it makes the graph begin at the first tapped layer, so that nothing
    below it is differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, taps: tuple[Tap | None, ...], *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """`parameters`: weight and bias of each layer."""
        weights = [weight for weight in parameters[::2] if weight is not None]
        found = tuple(F.linear(x, w, b) for w, b in zip(weights, parameters[1::2], strict=True))
        outputs = [y if tap and tap.output else None for y, tap in zip(found, taps, strict=True)]
        ctx.save_for_backward(x if any(taps) else None, *weights, *outputs)
        ctx.taps = taps
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        count = len(ctx.taps)
        dx: torch.Tensor | None = None
        for tap, weight, y, dy in zip(ctx.taps, rest[:count], rest[count:], gradients, strict=True):
            if dy is None:
                continue
            dy = dy.contiguous()
            if tap:
                tap.call(x, y, dy)
            if not ctx.needs_input_grad[0]:
                continue
            if dx is None:
                dx = dy @ weight
            else:
                dx.view(-1, dx.shape[-1]).addmm_(dy.view(-1, dy.shape[-1]), weight)
        return dx, None, None, *(None for _ in range(2 * count))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The root mean square is a constant for the gradient."""
    fast = kernels(x)
    if fast and not weight.requires_grad:
        return fast.RmsNorm.apply(x, weight, eps)
    wide = x.to(accurate(x.dtype))
    with torch.no_grad():
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The standard deviation is a constant for the gradient; the mean is not."""
    wide = x.to(accurate(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    with torch.no_grad():
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * scale
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """act(gate) * up: half the relevance to each branch, and the activation passes act(x)/x."""
    silu = isinstance(act, torch.nn.SiLU) or type(act).__name__ == "SiLUActivation"
    fast = kernels(gate)
    if fast and silu:
        return fast.Gated.apply(gate, up)
    return Gated.apply(gate, up, F.silu if silu else act, silu)


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor], silu: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.silu = act, silu
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, dm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        gate, up = ctx.saved_tensors
        wide, half = gate.to(accurate(gate.dtype)), dm.to(accurate(dm.dtype)) / 2
        # silu(x)/x without a division: 0.5 at 0, where a pruned neuron's gate stands
        ratio = torch.sigmoid(wide) if ctx.silu else _ratio(ctx.act, wide)
        return (half * up * ratio).to(dm.dtype), (half * ctx.act(wide)).to(dm.dtype), None, None


class Identity(torch.autograd.Function):
    """An activation that passes act(x)/x. ReLU's gradient is that already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        return act(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = ctx.saved_tensors[0].to(accurate(dy.dtype))
        return (dy.to(wide.dtype) * _ratio(ctx.act, wide)).to(dy.dtype), None


def _ratio(act: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """act(x)/x; act(0) is 0 for those in use (GELU, ReLU), so the limit at 0 is the slope, read beside it."""
    near = torch.where(x == 0, torch.full_like(x, 1e-4), x)
    return act(near) / near
