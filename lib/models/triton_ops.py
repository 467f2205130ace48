"""The same operations as one kernel each, so that a layer moves the fewest bytes besides its matrix products."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, w, out, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    v = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    tl.store(out + row * D + at, v * scale * tl.load(w + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    rows, width = x_MD.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x_MD, weight_D, out, width, eps, BLOCK=block, num_warps=8 if block > 2048 else 4)


@triton.jit
def _split_qkv(qkv, q, k, v, cos, sin, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr):
    """One token a program: all its heads. Rotation pairs x[i] with x[i + d/2]."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    d: tl.constexpr = 2 * HALF
    base = qkv + row * (H + 2 * K) * d + head * d + at
    inside = head < H + 2 * K
    a = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(base + HALF, mask=inside, other=0.0).to(tl.float32)
    c, s = tl.load(cos + row * d + at), tl.load(sin + row * d + at)
    c2, s2 = tl.load(cos + row * d + HALF + at), tl.load(sin + row * d + HALF + at)
    ra, rb = a * c - b * s, b * c2 + a * s2
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + K), (head >= H + K) & inside
    to_q = q + row * H * d + head * d + at
    tl.store(to_q, ra, mask=is_q)
    tl.store(to_q + HALF, rb, mask=is_q)
    to_k = k + row * K * d + (head - H) * d + at
    tl.store(to_k, ra, mask=is_k)
    tl.store(to_k + HALF, rb, mask=is_k)
    to_v = v + row * K * d + (head - H - K) * d + at
    tl.store(to_v, a, mask=is_v)
    tl.store(to_v + HALF, b, mask=is_v)


def split_qkv(
    qkv_MX: torch.Tensor,
    q_MHd: torch.Tensor,
    k_MKd: torch.Tensor,
    v_MKd: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    rows, heads, d = q_MHd.shape
    kv = k_MKd.shape[1]
    block = triton.next_power_of_2(heads + 2 * kv)
    _split_qkv[(rows,)](qkv_MX, q_MHd, k_MKd, v_MKd, cos, sin, heads, kv, d // 2, block, num_warps=4)


@triton.jit
def _swiglu(x, out, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def swiglu(gate_up_MX: torch.Tensor, out: torch.Tensor) -> None:
    rows, width = out.shape
    block = 2048
    _swiglu[(rows, triton.cdiv(width, block))](gate_up_MX, out, width, BLOCK=block, num_warps=8)


@triton.jit
def _log_prob(logits, target, out, V, BLOCK: tl.constexpr):
    """Each logit is read once: a running maximum and sum for every lane, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    peak = tl.max(top, 0)
    lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    tl.store(out + row, tl.load(logits + row * V + tl.load(target + row)).to(tl.float32) - lse)


def log_prob(logits_PV: torch.Tensor, target_P: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = logits_PV.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits_PV.device)
    _log_prob[(rows,)](logits_PV, target_P, out, vocabulary, BLOCK=4096, num_warps=8)
    return out


def attend(
    q_MHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
) -> torch.Tensor:
    """torch's own flash attention over ragged segments; causal from the last key on."""
    return torch.ops.aten._flash_attention_forward(
        q_MHd, k_NKd, v_NKd, query_ends, key_ends, longest_query, longest_key, 0.0, True, False
    )[0]
