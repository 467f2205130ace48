"""The decoder's element-wise operations and attention in plain torch: for the CPU, and for higher precision."""

import torch
from torch.nn import functional as F


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    wide = x_MD.to(accurate(x_MD.dtype))
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D)


def rope(x_MHd: torch.Tensor, cos_Md: torch.Tensor, sin_Md: torch.Tensor) -> torch.Tensor:
    wide = x_MHd.to(cos_Md.dtype)
    a, b = wide.chunk(2, -1)
    return (wide * cos_Md[:, None] + torch.cat([-b, a], -1) * sin_Md[:, None]).to(x_MHd.dtype)


def split_qkv(
    qkv_MX: torch.Tensor,
    q_MHd: torch.Tensor,
    k_MKd: torch.Tensor,
    v_MKd: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Queries and keys rotated into place, values copied."""
    heads, kv, d = q_MHd.shape[1], k_MKd.shape[1], q_MHd.shape[2]
    q, k, v = qkv_MX.split([heads * d, kv * d, kv * d], -1)
    q_MHd.copy_(rope(q.unflatten(-1, (heads, d)), cos, sin))
    k_MKd.copy_(rope(k.unflatten(-1, (kv, d)), cos, sin))
    v_MKd.copy_(v.unflatten(-1, (kv, d)))


def attend(
    q_MHd: torch.Tensor, kv: torch.Tensor, prefix: torch.Tensor | None, segments: list[list[int]], out: torch.Tensor
) -> None:
    """Causal attention of each segment over the prefix, its parent and itself; kv and prefix: [2, tokens, K, d]."""
    for start, length, parent, before in segments:
        own = slice(start, start + length)
        seen = [*([] if prefix is None else [prefix]), kv[:, parent : parent + before], kv[:, own]]
        q, (k, v) = q_MHd[own].transpose(0, 1), torch.cat(seen, 1).transpose(1, 2)
        mask = torch.ones(length, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - length)
        out[own] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)


def swiglu(gate_up_MX: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up_MX.to(accurate(gate_up_MX.dtype)).chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def log_prob(logits_PV: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
    wide = logits_PV.to(accurate(logits_PV.dtype))
    return wide.gather(1, target_P[:, None])[:, 0] - wide.logsumexp(1)


def log_sums(logits_PV: torch.Tensor, marked_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log of the sum of exp over all words, and over those that are marked."""
    wide = logits_PV.to(accurate(logits_PV.dtype))
    return wide.logsumexp(1), wide.masked_fill(~marked_V, -torch.inf).logsumexp(1)


def accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
