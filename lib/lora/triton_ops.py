"""plain_ops as one kernel each: a layer's widest activations are read once, and all sums are in a fixed order.
The products of adapters with those activations are made while the activations are at hand.

Suffixes as in plain_ops; S sums of a chunk each."""

import torch
import triton
import triton.language as tl

from lib.checkpoint.families import Shape
from lib.lora.attention import Segments, attend, attend_backward
from lib.models.decoder import on
from lib.models.triton_ops import rms_norm

__all__ = ["Segments", "attend", "attend_backward", "rms_norm"]

# Tiles, warps of each kernel.
ADD, SWIGLU, SWIGLU_BACKWARD = (64, 128, 4), (128, 64, 8), (32, 128, 4)  # tokens, columns: 138, 190; 438, 664 us
LOSS = 4096, 16


@triton.jit
def _add_rms_norm_backward(dy, x, w, g, dy_row, g_row, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    v = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    dn = tl.load(dy + row * dy_row + at, mask=inside, other=0.0).to(tl.float32)
    dn = dn * tl.load(w + at, mask=inside, other=0.0).to(tl.float32) * scale
    unit = v * scale
    dx = dn - unit * (tl.sum(dn * unit, 0) / D)
    place = g + row * g_row + at
    tl.store(place, tl.load(place, mask=inside, other=0.0).to(tl.float32) + dx, mask=inside)


def add_rms_norm_backward(
    dy_MD: torch.Tensor, x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, g_MD: torch.Tensor
) -> None:
    rows, width = x_MD.shape
    block = triton.next_power_of_2(width)
    with on(x_MD.device):
        _add_rms_norm_backward[(rows,)](
            dy_MD, x_MD, weight_D, g_MD, dy_MD.stride(0), g_MD.stride(0), width, eps, BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip


@triton.jit
def _turn(qkv, cos, sin, X, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """One token a program: its queries and keys. Rotation pairs x[i] with x[i + d/2]."""
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, BLOCK)[:, None], tl.arange(0, HALF)[None, :]
    inside = head < HEADS
    place = qkv + row * X + head * (2 * HALF) + at
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    table = row * 2 * HALF + at
    c1, c2 = tl.load(cos + table), tl.load(cos + table + HALF)
    s1, s2 = tl.load(sin + table), tl.load(sin + table + HALF)
    if BACK:
        ra, rb = a * c1 + b * s2, b * c2 - a * s1
    else:
        ra, rb = a * c1 - b * s1, b * c2 + a * s2
    tl.store(place, ra, mask=inside)
    tl.store(place + HALF, rb, mask=inside)


def rotate(qkv_MX: torch.Tensor, cos_Md: torch.Tensor, sin_Md: torch.Tensor, shape: Shape, back: bool = False) -> None:
    heads = shape.heads + shape.kv_heads
    with on(qkv_MX.device):
        _turn[(len(qkv_MX),)](
            qkv_MX, cos_Md, sin_Md, qkv_MX.shape[1], heads, shape.head // 2, triton.next_power_of_2(heads), back,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _add_adapter(x, y, t, b, out, y_row, t_row, M, D, R, BM: tl.constexpr, BD: tl.constexpr, RANKS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    d, r = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, RANKS)
    inside = (m < M) & (d[None, :] < D)
    mine = tl.load(t + m * t_row + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
    weight = tl.load(b + d[:, None] * R + r[None, :], mask=(d[:, None] < D) & (r[None, :] < R), other=0.0)
    v = tl.load(x + m * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    v += tl.load(y + m * y_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.dot(mine, tl.trans(weight), v, input_precision="ieee")
    tl.store(out + m * D + d[None, :], v, mask=inside)


def add_adapter(
    x_MD: torch.Tensor, y_MD: torch.Tensor, t_MR: torch.Tensor, b_DR: torch.Tensor, out_MD: torch.Tensor
) -> None:
    (m, d), (bm, bd, warps) = x_MD.shape, ADD
    with on(x_MD.device):
        _add_adapter[(triton.cdiv(m, bm), triton.cdiv(d, bd))](
            x_MD, y_MD, t_MR, b_DR, out_MD, y_MD.stride(0), t_MR.stride(0), m, d, b_DR.shape[1], bm, bd,
            triton.next_power_of_2(b_DR.shape[1]), num_warps=warps,
        )  # fmt: skip


@triton.jit
def _swiglu(
    gate_up, a, inner, sums, F, M, R, CHUNK: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, RANKS: tl.constexpr
):
    """BM tokens of a chunk of columns: inner, and the chunk's part of its product with a."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, RANKS)
    t = tl.zeros([BM, RANKS], tl.float32)
    for start in range(0, CHUNK, BF):
        f = tl.program_id(1) * CHUNK + start + tl.arange(0, BF)
        inside = (m[:, None] < M) & (f[None, :] < F)
        at = gate_up + m[:, None] * 2 * F + f[None, :]
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        made = (g / (1.0 + tl.exp(-g)) * tl.load(at + F, mask=inside, other=0.0).to(tl.float32)).to(
            inner.dtype.element_ty
        )
        tl.store(inner + m[:, None] * F + f[None, :], made, mask=inside)
        x = tl.load(a + r[:, None] * F + f[None, :], mask=(r[:, None] < R) & (f[None, :] < F), other=0.0)
        t = tl.dot(made, tl.trans(x), t, input_precision="ieee")
    place = sums + (tl.program_id(1) * M + m[:, None]) * R + r[None, :]
    tl.store(place, t, mask=(m[:, None] < M) & (r[None, :] < R))


def chunk_of(inner: int) -> int:
    """Columns, or on the way back tokens, whose sums are made at once: enough programs for small models, few sums for
    large ones."""
    return 512 if inner < 8192 else 1024


def swiglu(gate_up_MF: torch.Tensor, a_RF: torch.Tensor, inner_MF: torch.Tensor, t_MR: torch.Tensor) -> None:
    m, f = inner_MF.shape
    (bm, bf, warps), ranks, chunk = SWIGLU, len(a_RF), chunk_of(f)
    sums_SMR = torch.empty(triton.cdiv(f, chunk), m, ranks, dtype=torch.float32, device=inner_MF.device)
    with on(inner_MF.device):
        _swiglu[(triton.cdiv(m, bm), len(sums_SMR))](
            gate_up_MF, a_RF, inner_MF, sums_SMR, f, m, ranks, chunk, bm, bf, triton.next_power_of_2(ranks),
            num_warps=warps,
        )  # fmt: skip
    t_MR.copy_(sums_SMR.sum(0))


@triton.jit
def _swiglu_backward(
    gate_up, dinner, t, dt, sums_b, sums_a, t_row, dt_row, F, M, RB, RA, GROUP: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, RANKS_B: tl.constexpr, RANKS_A: tl.constexpr,
):  # fmt: skip
    """BF columns of a group of tokens: their gradient, in place, and the group's part of three products of adapters."""
    f, group = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1)
    rb, ra = tl.arange(0, RANKS_B), tl.arange(0, RANKS_A)
    gate_b, up_b = tl.zeros([BF, RANKS_B], tl.float32), tl.zeros([BF, RANKS_B], tl.float32)
    down_a = tl.zeros([BF, RANKS_A], tl.float32)
    kind = gate_up.dtype.element_ty
    for start in range(0, GROUP, BM):
        m = group.to(tl.int64) * GROUP + start + tl.arange(0, BM)
        inside = (m[:, None] < M) & (f[None, :] < F)
        at = gate_up + m[:, None] * 2 * F + f[None, :]
        g, u = (
            tl.load(at, mask=inside, other=0.0).to(tl.float32),
            tl.load(at + F, mask=inside, other=0.0).to(tl.float32),
        )
        dm = tl.load(dinner + m[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
        half = 1.0 / (1.0 + tl.exp(-g))
        act = g * half
        dg, du = (dm * u * (half + act * (1.0 - half))).to(kind), (dm * act).to(kind)
        tl.store(at, dg, mask=inside)
        tl.store(at + F, du, mask=inside)
        x = tl.load(t + m[:, None] * t_row + rb[None, :], mask=(m[:, None] < M) & (rb[None, :] < RB), other=0.0)
        gate_b = tl.dot(tl.trans(dg), x, gate_b, input_precision="ieee")
        up_b = tl.dot(tl.trans(du), x, up_b, input_precision="ieee")
        x = tl.load(dt + m[:, None] * dt_row + ra[None, :], mask=(m[:, None] < M) & (ra[None, :] < RA), other=0.0)
        down_a = tl.dot(tl.trans((act * u).to(kind)), x, down_a, input_precision="ieee")
    b_at = sums_b + (group * 2 * F + f[:, None]) * RB + rb[None, :]
    b_inside = (f[:, None] < F) & (rb[None, :] < RB)
    tl.store(b_at, gate_b, mask=b_inside)
    tl.store(b_at + F * RB, up_b, mask=b_inside)
    tl.store(sums_a + (group * RA + ra[None, :]) * F + f[:, None], down_a, mask=(f[:, None] < F) & (ra[None, :] < RA))


def swiglu_backward(
    gate_up_MF: torch.Tensor,
    dinner_MF: torch.Tensor,
    t_MR: torch.Tensor,
    dt_MR: torch.Tensor,
    db_FR: torch.Tensor,
    da_RF: torch.Tensor,
) -> None:
    m, f = dinner_MF.shape
    (bm, bf, warps), group = SWIGLU_BACKWARD, chunk_of(f)
    ranks_b, ranks_a = t_MR.shape[1], dt_MR.shape[1]
    groups = -(-m // group)
    sums_b, sums_a = (
        torch.empty(groups, *shape, dtype=torch.float32, device=gate_up_MF.device)
        for shape in (db_FR.shape, da_RF.shape)
    )
    with on(gate_up_MF.device):
        _swiglu_backward[(triton.cdiv(f, bf), groups)](
            gate_up_MF, dinner_MF, t_MR, dt_MR, sums_b, sums_a, t_MR.stride(0), dt_MR.stride(0), f, m, ranks_b, ranks_a,
            group, bm, bf, triton.next_power_of_2(ranks_b), triton.next_power_of_2(ranks_a), num_warps=warps,
        )  # fmt: skip
    torch.sum(sums_b, 0, out=db_FR)
    torch.sum(sums_a, 0, out=da_RF)


@triton.jit
def _loss_backward(logits, target, share, loss, V, BLOCK: tl.constexpr):
    """A running maximum and sum for every lane, joined at the end; then each logit again, which is still near."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    top, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    peak = tl.max(top, 0)
    lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    word = tl.load(target + row)
    factor = tl.where(word >= 0, tl.load(share), 0.0)
    own = tl.load(logits + tl.maximum(word, 0)).to(tl.float32)
    tl.debug_barrier()  # read before its place is written
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        tl.store(logits + at, (tl.exp(x - lse) - tl.where(at == word, 1.0, 0.0)) * factor, mask=at < V)
    tl.store(loss + row, (lse - own) * factor)


def loss_backward(logits_PV: torch.Tensor, target_P: torch.Tensor, share: torch.Tensor, loss_P: torch.Tensor) -> None:
    rows, vocabulary = logits_PV.shape
    with on(logits_PV.device):
        _loss_backward[(rows,)](logits_PV, target_P, share, loss_P, vocabulary, BLOCK=LOSS[0], num_warps=LOSS[1])


def mm_wide(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(a, b, out_dtype=out.dtype, out=out)
