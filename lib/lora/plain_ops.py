"""A layer's element-wise work, attention and the loss, forwards and backwards, in plain torch: for the CPU and in
higher precision. triton_ops has the same functions as one kernel each.

Suffixes: M tokens, D hidden, X q, k and v side by side, d head width, F inner, R ranks, P predictions, V words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lib.checkpoint.families import Shape
from lib.models.plain_ops import accurate, rms_norm

__all__ = ["rms_norm"]


@dataclass(frozen=True)
class Segments:
    """Where rows begin, and how long they are."""

    of: list[tuple[int, int]]

    @staticmethod
    def empty(shape: Shape, tokens: int, rows: int, device: torch.device) -> "Segments":
        return Segments([])

    def put(self, segments: np.ndarray) -> None:
        self.of[:] = [(int(start), int(length)) for start, length in segments]


def add_rms_norm_backward(
    dy_MD: torch.Tensor, x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, g_MD: torch.Tensor
) -> None:
    """g += the gradient at the norm's input."""
    wide = x_MD.to(accurate(x_MD.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    dn = dy_MD * weight_D.to(wide.dtype) * scale
    unit = wide * scale
    g_MD += (dn - unit * (dn * unit).mean(-1, keepdim=True)).to(g_MD.dtype)


def rotate(qkv_MX: torch.Tensor, cos_Md: torch.Tensor, sin_Md: torch.Tensor, shape: Shape, back: bool = False) -> None:
    """Queries and keys turned in place, or, for gradients, turned back."""
    heads = shape.heads + shape.kv_heads
    part = qkv_MX[:, : heads * shape.head].unflatten(-1, (heads, shape.head))
    wide, cos, sin = part.to(cos_Md.dtype), cos_Md[:, None], sin_Md[:, None]
    if back:
        a, b = (wide * sin).chunk(2, -1)
        turned = wide * cos + torch.cat([b, -a], -1)
    else:
        a, b = wide.chunk(2, -1)
        turned = wide * cos + torch.cat([-b, a], -1) * sin
    part.copy_(turned)


def attend(qkv_MX: torch.Tensor, rows: Segments, shape: Shape, out_MQ: torch.Tensor, lse_MH: torch.Tensor) -> None:
    """Causal attention of each row over itself; its softmax's divisors are for the kernels alone."""
    for start, length in rows.of:
        q, k, v = _heads(qkv_MX[start : start + length], shape)
        out_MQ[start : start + length] = _attended(q, k, v).transpose(0, 1).flatten(1)


def attend_backward(
    qkv_MX: torch.Tensor,
    rows: Segments,
    shape: Shape,
    out_MQ: torch.Tensor,
    lse_MH: torch.Tensor,
    delta_MH: torch.Tensor,
    dout_MQ: torch.Tensor,
    dqkv_MX: torch.Tensor,
) -> None:
    for start, length in rows.of:
        own = slice(start, start + length)
        with torch.enable_grad():
            qkv = qkv_MX[own].clone().requires_grad_()
            out = _attended(*_heads(qkv, shape)).transpose(0, 1).flatten(1)
            (dqkv_MX[own],) = torch.autograd.grad(out, qkv, dout_MQ[own])


def _heads(qkv: torch.Tensor, shape: Shape) -> Sequence[torch.Tensor]:
    sizes = shape.heads, shape.kv_heads, shape.kv_heads
    parts = qkv.split([n * shape.head for n in sizes], -1)
    return [part.unflatten(-1, (n, shape.head)).transpose(0, 1) for part, n in zip(parts, sizes, strict=True)]


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def add_adapter(
    x_MD: torch.Tensor, y_MD: torch.Tensor, t_MR: torch.Tensor, b_DR: torch.Tensor, out_MD: torch.Tensor
) -> None:
    """x + y + t b^T, rounded once: an adapter that only begins to learn is small beside the residual."""
    kind = accurate(x_MD.dtype)
    out_MD.copy_(torch.addmm(x_MD.to(kind) + y_MD, t_MR.to(kind), b_DR.t().to(kind)))


def swiglu(gate_up_MF: torch.Tensor, a_RF: torch.Tensor, inner_MF: torch.Tensor, t_MR: torch.Tensor) -> None:
    """inner = silu(gate) * up, and its product with the down-projection's A."""
    gate, up = gate_up_MF.to(accurate(gate_up_MF.dtype)).chunk(2, -1)
    inner_MF.copy_(F.silu(gate) * up)
    torch.mm(inner_MF, a_RF.t(), out=t_MR)


def swiglu_backward(
    gate_up_MF: torch.Tensor,
    dinner_MF: torch.Tensor,
    t_MR: torch.Tensor,
    dt_MR: torch.Tensor,
    db_FR: torch.Tensor,
    da_RF: torch.Tensor,
) -> None:
    """gate_up becomes its gradient; db = gradient^T t, of gate's and up's B, and da = dt^T inner, of down's A."""
    gate, up = gate_up_MF.to(accurate(gate_up_MF.dtype)).chunk(2, -1)
    half = torch.sigmoid(gate)
    act = gate * half
    mm_wide(dt_MR.t(), (act * up).to(dt_MR.dtype), da_RF)
    dgate = dinner_MF * up * (half + act * (1 - half))
    gate_up_MF.copy_(torch.cat([dgate, dinner_MF * act], -1))
    mm_wide(gate_up_MF.t(), t_MR, db_FR)


def loss_backward(logits_PV: torch.Tensor, target_P: torch.Tensor, share: torch.Tensor, loss_P: torch.Tensor) -> None:
    """loss = -log p(target) * share, and logits become its gradient; a target of -1 has neither."""
    wide, real = logits_PV.to(accurate(logits_PV.dtype)), target_P >= 0
    at = target_P.clamp(min=0)[:, None]
    logs = wide.log_softmax(-1)
    loss_P.copy_(torch.where(real, -logs.gather(1, at)[:, 0], 0.0) * share)
    grad = logs.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=logs.dtype))
    logits_PV.copy_(grad * (real[:, None] * share))


def mm_wide(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """A product whose sums are kept as they are made: gradients of adapters."""
    torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
