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
    q_MHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    query_ends: list[int],
    key_ends: list[int],
    out: torch.Tensor,
) -> None:
    """Causal attention of each segment by itself; a segment's queries are the last of its keys."""
    spans = zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False)
    for a, b, c, e in spans:
        q, k, v = (t.transpose(0, 1) for t in (q_MHd[a:b], k_NKd[c:e], v_NKd[c:e]))
        seen = torch.ones(b - a, e - c, dtype=torch.bool, device=q.device).tril(e - c - (b - a))
        out[a:b] = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(0, 1)


def swiglu(gate_up_MX: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up_MX.to(accurate(gate_up_MX.dtype)).chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def log_prob(logits_PV: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
    wide = logits_PV.to(accurate(logits_PV.dtype))
    return wide.gather(1, target_P[:, None])[:, 0] - wide.logsumexp(1)


def accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
