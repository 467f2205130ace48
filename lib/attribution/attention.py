"""Causal attention in Triton whose gradient adds up in a fixed order, rope and the rule's factors included.

Why not the libraries': repeated 100 times at 2,048 tokens on an H200, cuDNN's gradient differed in a few values of ten
million, also when asked for determinism, and flash attention's deterministic one takes 1.8 times as long.

Suffixes: B samples, T tokens, H query heads, K key heads, d head width. All tensors are contiguous [B, T, heads, d]."""

from typing import Any

import torch
import triton
import triton.language as tl

from lib.attribution.fused import rotate, small
from lib.attribution.rules import FACTORS
from lib.models.decoder import on

LOG2E = 1.4426950408889634


@triton.jit
def _load(x, block, T, stride, D: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """N tokens of one head from block * N on, [N, D]."""
    t = block * N + tl.arange(0, N)
    at = x + t[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at) if EVEN else tl.load(at, mask=t[:, None] < T, other=0.0)


@triton.jit
def _forward(
    q, k, v, out, lse, T, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head; the last blocks, which see the most keys, start first. BQ is a multiple of BK."""
    block, bh = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    q += b * T * H * D + h * D
    k += b * T * K * D + h // (H // K) * D
    v += b * T * K * D + h // (H // K) * D
    x = _load(q, block, T, H * D, D, BQ, EVEN)
    row = block * BQ + tl.arange(0, BQ)
    top = tl.full([BQ], -1e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    sums = tl.zeros([BQ, D], tl.float32)
    first = block * (BQ // BK)  # of the key blocks that hold keys after some of the queries
    for j in range(0, first):
        key, value = _load(k, j, T, K * D, D, BK, True), _load(v, j, T, K * D, D, BK, True)
        s = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
        higher = tl.maximum(top, tl.max(s, 1))
        p, keep = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * keep + tl.sum(p, 1)
        sums = tl.dot(p.to(value.dtype), value, sums * keep[:, None], input_precision="ieee")
        top = higher
    for j in range(first, first + BQ // BK):
        key, value = _load(k, j, T, K * D, D, BK, EVEN), _load(v, j, T, K * D, D, BK, EVEN)
        s = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
        s = tl.where((j * BK + tl.arange(0, BK))[None, :] <= row[:, None], s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p, keep = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * keep + tl.sum(p, 1)
        sums = tl.dot(p.to(value.dtype), value, sums * keep[:, None], input_precision="ieee")
        top = higher
    inside = row < T
    at = out + b * T * H * D + h * D + row[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(at, sums / total[:, None], mask=inside[:, None])
    tl.store(lse + bh.to(tl.int64) * T + row, top + tl.log2(total), mask=inside)


@triton.jit
def _dq_part(x, dx, level, delta, k, v, j, T, row, scale, dq, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
             MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    key, value = _load(k, j, T, K * D, D, BK, EVEN), _load(v, j, T, K * D, D, BK, EVEN)
    p = tl.exp2(tl.dot(x, tl.trans(key), input_precision="ieee") * scale - level[:, None])
    if MASK:
        p = tl.where((j * BK + tl.arange(0, BK))[None, :] <= row[:, None], p, 0.0)
    ds = p * (tl.dot(dx, tl.trans(value), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")


@triton.jit
def _backward_q(
    q, k, v, out, dout, lse, delta, dq, T, scale, factor,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; also delta = sum of out * dout, which the keys' gradient needs."""
    block, bh = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    k += b * T * K * D + h // (H // K) * D
    v += b * T * K * D + h // (H // K) * D
    mine = b * T * H * D + h * D
    x, dx = _load(q + mine, block, T, H * D, D, BQ, EVEN), _load(dout + mine, block, T, H * D, D, BQ, EVEN)
    y = _load(out + mine, block, T, H * D, D, BQ, EVEN)
    row = block * BQ + tl.arange(0, BQ)
    inside = row < T
    d = tl.sum(y.to(tl.float32) * dx.to(tl.float32), 1)
    tl.store(delta + bh.to(tl.int64) * T + row, d, mask=inside)
    level = tl.load(lse + bh.to(tl.int64) * T + row, mask=inside, other=float("inf"))
    sums = tl.zeros([BQ, D], tl.float32)
    first = block * (BQ // BK)
    for j in range(0, first):
        sums = _dq_part(x, dx, level, d, k, v, j, T, row, scale, sums, K, D, BK, False, True)
    for j in range(first, first + BQ // BK):
        sums = _dq_part(x, dx, level, d, k, v, j, T, row, scale, sums, K, D, BK, True, EVEN)
    at = dq + mine + row[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(at, sums * factor, mask=inside[:, None])


@triton.jit
def _dkv_part(key, value, q, dout, lse, delta, i, T, column, scale, dk, dv, H: tl.constexpr, D: tl.constexpr,
              BQ: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    x, dx = _load(q, i, T, H * D, D, BQ, EVEN), _load(dout, i, T, H * D, D, BQ, EVEN)
    row = i * BQ + tl.arange(0, BQ)
    if EVEN:
        level, d = tl.load(lse + row), tl.load(delta + row)
    else:
        level = tl.load(lse + row, mask=row < T, other=float("inf"))
        d = tl.load(delta + row, mask=row < T, other=0.0)
    p = tl.exp2(tl.dot(key, tl.trans(x), input_precision="ieee") * scale - level[None, :])
    if MASK:
        p = tl.where(column[:, None] <= row[None, :], p, 0.0)
    dv = tl.dot(p.to(dx.dtype), dx, dv, input_precision="ieee")
    ds = p * (tl.dot(value, tl.trans(dx), input_precision="ieee") - d[None, :])
    return tl.dot(ds.to(x.dtype), x, dk, input_precision="ieee"), dv


@triton.jit
def _backward_kv(
    q, k, v, dout, lse, delta, dk, dv, T, scale, factor,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of keys and values from one query head; BK is a multiple of BQ."""
    block, bh = tl.program_id(1), tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    shared = b * T * K * D + h // (H // K) * D
    mine = b * T * H * D + h * D
    key, value = _load(k + shared, block, T, K * D, D, BK, EVEN), _load(v + shared, block, T, K * D, D, BK, EVEN)
    column = block * BK + tl.arange(0, BK)
    sums_k, sums_v = tl.zeros([BK, D], tl.float32), tl.zeros([BK, D], tl.float32)
    lse += bh.to(tl.int64) * T
    delta += bh.to(tl.int64) * T
    first = block * (BK // BQ)
    for i in range(first, first + BK // BQ):
        sums_k, sums_v = _dkv_part(key, value, q + mine, dout + mine, lse, delta, i, T, column, scale, sums_k, sums_v,
                                   H, D, BQ, True, EVEN)  # fmt: skip
    for i in range(first + BK // BQ, tl.cdiv(T, BQ)):
        sums_k, sums_v = _dkv_part(key, value, q + mine, dout + mine, lse, delta, i, T, column, scale, sums_k, sums_v,
                                   H, D, BQ, False, EVEN)  # fmt: skip
    at = mine + column[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dk + at, sums_k * factor, mask=column[:, None] < T)
    tl.store(dv + at, sums_v, mask=column[:, None] < T)


# (queries, keys, warps, stages) of each kernel's tile: the fastest of a dozen on an H200, 32 and 8 heads of 128, 2,048
# tokens: 124, 153 and 172 us.
FORWARD, BACKWARD_Q, BACKWARD_KV = (128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 2)
MOST_SMALL = 32  # of either side, where shared memory is small


def supports(head: int) -> bool:
    return head in (16, 32, 64, 128)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, H, d] and the base-2 logarithm of each softmax's divisor [B, H, T]."""
    samples, tokens, heads, width = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(samples, heads, tokens, dtype=torch.float32, device=q.device)
    bq, bk, warps, stages = _tile(FORWARD, q)
    with on(q.device):
        _forward[(samples * heads, triton.cdiv(tokens, bq))](
            q, k, v, out, lse, tokens, scale * LOG2E, heads, k.shape[2], width, bq, bk, tokens % max(bq, bk) == 0,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, and of k and v from each query head apart, in float32."""
    samples, tokens, heads, width = q.shape
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    dk, dv = (torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    shape = heads, k.shape[2], width
    with on(q.device):
        bq, bk, warps, stages = _tile(BACKWARD_Q, q)
        _backward_q[(samples * heads, triton.cdiv(tokens, bq))](
            q, k, v, out, dout, lse, delta, dq, tokens, scale * LOG2E, scale, *shape, bq, bk,
            tokens % max(bq, bk) == 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        bq, bk, warps, stages = _tile(BACKWARD_KV, q)
        _backward_kv[(samples * heads, triton.cdiv(tokens, bk))](
            q, k, v, dout, lse, delta, dk, dv, tokens, scale * LOG2E, scale, *shape, bq, bk,
            tokens % max(bq, bk) == 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv


def _tile(tile: tuple[int, int, int, int], q: torch.Tensor) -> tuple[int, int, int, int]:
    """Not larger than a short sample needs; both sides stay powers of two, so one divides the other."""
    most = MOST_SMALL if small(q.device) else max(16, triton.next_power_of_2(q.shape[1]))
    return min(tile[0], most), min(tile[1], most), tile[2] if most >= 64 else 4, 2 if most < 64 else tile[3]


class RopeAttention(torch.autograd.Function):
    """q and k turned by rope, attention, and on the way back the rule's factors at q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        scale: float,
        rule: str,
    ) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        q, k, v = rotate(q, cos, sin, 1), rotate(k, cos, sin, 1), v.contiguous()
        out, lse = forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin)
        ctx.scale, ctx.rule = scale, rule
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, cos, sin = ctx.saved_tensors
        dq, dk, dv = backward(q, k, v, out, lse, dout.contiguous(), ctx.scale)
        qk, value = FACTORS[ctx.rule]
        return (
            rotate(dq, cos, sin, -1, qk) if qk else None,
            rotate(dk, cos, sin, -1, qk, k.shape[2], k.dtype) if qk else None,
            rotate(dv, cos, sin, 0, value, k.shape[2], k.dtype),
            None,
            None,
            None,
            None,
        )
