"""plain_ops as one kernel each: a layer's widest activations are read once, and all sums are in a fixed order.
The products of adapters with those activations are made while the activations are at hand.

Suffixes as in plain_ops; S sums of a chunk each."""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from lib.checkpoint.families import Shape
from lib.lora.batches import most_tiles, tiles
from lib.models.decoder import on, to_device

LOG2E = 1.4426950408889634
# Tiles, warps, stages of each kernel.
# Query rows (positions times the heads that share a key head) and keys, or keys and query rows a turn:
ATTEND, ATTEND_Q, ATTEND_KV = (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)
ADD, SWIGLU, SWIGLU_BACKWARD = (64, 128, 4), (128, 64, 8), (32, 128, 4)  # tokens, columns
LOSS = 4096, 16


@dataclass(frozen=True)
class Segments:
    """Tiles of query rows and of keys, always as many."""

    queries: torch.Tensor
    keys: torch.Tensor
    group: int

    @staticmethod
    def empty(shape: Shape, tokens: int, rows: int, device: torch.device) -> "Segments":
        group = shape.heads // shape.kv_heads

        def make(group: int, tile: int) -> torch.Tensor:
            return torch.zeros(most_tiles(tokens, group, tile, rows), 3, dtype=torch.int32, device=device)

        return Segments(make(group, ATTEND[0]), make(1, ATTEND_KV[0]), group)

    def put(self, segments: np.ndarray) -> None:
        for table, group, tile in ((self.queries, self.group, ATTEND[0]), (self.keys, 1, ATTEND_KV[0])):
            table.copy_(to_device(tiles(segments, group, tile, len(table)), table.device), non_blocking=True)


@triton.jit
def _rms_norm(x, w, out, out_row, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    v = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    tl.store(out + row * out_row + at, v * scale * tl.load(w + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_MD: torch.Tensor) -> None:
    rows, width = x_MD.shape
    block = triton.next_power_of_2(width)
    with on(x_MD.device):
        _rms_norm[(rows,)](
            x_MD, weight_D, out_MD, out_MD.stride(0), width, eps, BLOCK=block, num_warps=8 if block > 2048 else 4
        )


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
def _rows_of(x, token, head, inside, width, D: tl.constexpr):
    """[rows, D] of some tokens' heads; x has `width` values a token."""
    at = token[:, None] * width + head[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=inside[:, None], other=0.0)


@triton.jit
def _attend(
    qkv, tile, out, lse, scale, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of query rows under one key head. Rows are (position, query head of the group): short rows fill it."""
    G: tl.constexpr = H // K
    X: tl.constexpr = (H + 2 * K) * D
    at, head = tile + tl.program_id(0) * 3, tl.program_id(1)
    start, length, first = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    row = first + tl.arange(0, ROWS)
    position, query_head = row // G, head * G + row % G
    inside = position < length
    token = (start + position).to(tl.int64)
    x = _rows_of(qkv, token, query_head, inside, X, D)
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    for begin in range(0, tl.minimum((first + ROWS - 1) // G + 1, length), KEYS):
        j = begin + tl.arange(0, KEYS)
        exists, other = j < length, (start + j).to(tl.int64)
        key = _rows_of(qkv, other, H + head + 0 * j, exists, X, D)
        value = _rows_of(qkv, other, H + K + head + 0 * j, exists, X, D)
        s = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
        s = tl.where(exists[None, :] & (j[None, :] <= position[:, None]), s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p, keep = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * keep + tl.sum(p, 1)
        sums = tl.dot(p.to(value.dtype), value, sums * keep[:, None], input_precision="ieee")
        top = higher
    place = token[:, None] * (H * D) + query_head[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + place, sums / total[:, None], mask=inside[:, None])
    tl.store(lse + token * H + query_head, top + tl.log2(total), mask=inside)


@triton.jit
def _attend_backward_q(
    qkv, tile, out, lse, delta, dout, dqkv, scale, factor, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The same tile's gradient; also delta = sum of out * dout, which the keys' gradient needs."""
    G: tl.constexpr = H // K
    X: tl.constexpr = (H + 2 * K) * D
    at, head = tile + tl.program_id(0) * 3, tl.program_id(1)
    start, length, first = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    row = first + tl.arange(0, ROWS)
    position, query_head = row // G, head * G + row % G
    inside = position < length
    token = (start + position).to(tl.int64)
    x, dx = _rows_of(qkv, token, query_head, inside, X, D), _rows_of(dout, token, query_head, inside, H * D, D)
    y = _rows_of(out, token, query_head, inside, H * D, D)
    d = tl.sum(y.to(tl.float32) * dx.to(tl.float32), 1)
    tl.store(delta + token * H + query_head, d, mask=inside)
    level = tl.load(lse + token * H + query_head, mask=inside, other=float("inf"))
    sums = tl.zeros([ROWS, D], tl.float32)
    for begin in range(0, tl.minimum((first + ROWS - 1) // G + 1, length), KEYS):
        j = begin + tl.arange(0, KEYS)
        exists, other = j < length, (start + j).to(tl.int64)
        key = _rows_of(qkv, other, H + head + 0 * j, exists, X, D)
        value = _rows_of(qkv, other, H + K + head + 0 * j, exists, X, D)
        p = tl.exp2(tl.dot(x, tl.trans(key), input_precision="ieee") * scale - level[:, None])
        p = tl.where(exists[None, :] & (j[None, :] <= position[:, None]), p, 0.0)
        ds = p * (tl.dot(dx, tl.trans(value), input_precision="ieee") - d[:, None])
        sums = tl.dot(ds.to(key.dtype), key, sums, input_precision="ieee")
    place = token[:, None] * X + query_head[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dqkv + place, sums * factor, mask=inside[:, None])


@triton.jit
def _attend_backward_kv(
    qkv, tile, lse, delta, dout, dqkv, scale, factor, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of keys and values, over all queries of their group that see them."""
    G: tl.constexpr = H // K
    X: tl.constexpr = (H + 2 * K) * D
    at, head = tile + tl.program_id(0) * 3, tl.program_id(1)
    start, length, first = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    j = first + tl.arange(0, KEYS)
    exists, mine = j < length, (start + j).to(tl.int64)
    key = _rows_of(qkv, mine, H + head + 0 * j, exists, X, D)
    value = _rows_of(qkv, mine, H + K + head + 0 * j, exists, X, D)
    sums_k, sums_v = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    for begin in range(first * G, length * G, ROWS):
        row = begin + tl.arange(0, ROWS)
        position, query_head = row // G, head * G + row % G
        inside = position < length
        token = (start + position).to(tl.int64)
        x, dx = _rows_of(qkv, token, query_head, inside, X, D), _rows_of(dout, token, query_head, inside, H * D, D)
        level = tl.load(lse + token * H + query_head, mask=inside, other=float("inf"))
        d = tl.load(delta + token * H + query_head, mask=inside, other=0.0)
        p = tl.exp2(tl.dot(key, tl.trans(x), input_precision="ieee") * scale - level[None, :])
        p = tl.where(exists[:, None] & (j[:, None] <= position[None, :]), p, 0.0)
        sums_v = tl.dot(p.to(dx.dtype), dx, sums_v, input_precision="ieee")
        ds = p * (tl.dot(value, tl.trans(dx), input_precision="ieee") - d[None, :])
        sums_k = tl.dot(ds.to(x.dtype), x, sums_k, input_precision="ieee")
    place = mine[:, None] * X + (H + head) * D + tl.arange(0, D)[None, :]
    tl.store(dqkv + place, sums_k * factor, mask=exists[:, None])
    tl.store(dqkv + place + K * D, sums_v, mask=exists[:, None])


def attend(qkv_MX: torch.Tensor, rows: Segments, shape: Shape, out_MQ: torch.Tensor, lse_MH: torch.Tensor) -> None:
    """lse: the base-2 logarithm of each softmax's divisor."""
    s, (tile, keys, warps, stages) = shape, ATTEND
    with on(qkv_MX.device):
        _attend[(len(rows.queries), s.kv_heads)](
            qkv_MX, rows.queries, out_MQ, lse_MH, s.head**-0.5 * LOG2E, s.heads, s.kv_heads, s.head, tile, keys,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


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
    s, scale = shape, shape.head**-0.5
    heads = s.heads, s.kv_heads, s.head
    with on(qkv_MX.device):
        tile, keys, warps, stages = ATTEND_Q
        _attend_backward_q[(len(rows.queries), s.kv_heads)](
            qkv_MX, rows.queries, out_MQ, lse_MH, delta_MH, dout_MQ, dqkv_MX, scale * LOG2E, scale, *heads, tile, keys,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        keys, turn, warps, stages = ATTEND_KV
        _attend_backward_kv[(len(rows.keys), s.kv_heads)](
            qkv_MX, rows.keys, lse_MH, delta_MH, dout_MQ, dqkv_MX, scale * LOG2E, scale, *heads, turn, keys,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


@triton.jit
def _add_adapter(x, t, b, out, t_row, M, D, R, BM: tl.constexpr, BD: tl.constexpr, RANKS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    d, r = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, RANKS)
    inside = (m < M) & (d[None, :] < D)
    mine = tl.load(t + m * t_row + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
    weight = tl.load(b + d[:, None] * R + r[None, :], mask=(d[:, None] < D) & (r[None, :] < R), other=0.0)
    v = tl.load(x + m * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.dot(mine, tl.trans(weight), v, input_precision="ieee")
    tl.store(out + m * D + d[None, :], v, mask=inside)


def add_adapter(x_MD: torch.Tensor, t_MR: torch.Tensor, b_DR: torch.Tensor, out_MD: torch.Tensor) -> None:
    """x + t b^T: where the product that follows adds to `out`, nothing is copied."""
    (m, d), (bm, bd, warps) = x_MD.shape, ADD
    with on(x_MD.device):
        _add_adapter[(triton.cdiv(m, bm), triton.cdiv(d, bd))](
            x_MD, t_MR, b_DR, out_MD, t_MR.stride(0), m, d, b_DR.shape[1], bm, bd,
            triton.next_power_of_2(b_DR.shape[1]), num_warps=warps,
        )  # fmt: skip


@triton.jit
def _swiglu(
    gate_up, t, b, a, inner, sums, t_row, b_row, F, M, RB, RA, CHUNK: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, RANKS_B: tl.constexpr, RANKS_A: tl.constexpr,
):  # fmt: skip
    """BM tokens of a chunk of columns: inner, and the chunk's part of its product with a."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    rb, ra = tl.arange(0, RANKS_B)[None, :], tl.arange(0, RANKS_A)
    mine = tl.load(t + m * t_row + rb, mask=(m < M) & (rb < RB), other=0.0)
    total = tl.zeros([BM, RANKS_A], tl.float32)
    for start in range(0, CHUNK, BF):
        f = tl.program_id(1) * CHUNK + start + tl.arange(0, BF)
        inside = (m < M) & (f[None, :] < F)
        at, b_at = gate_up + m * 2 * F + f[None, :], b + f[:, None].to(tl.int64) * b_row + rb
        b_inside = (f[:, None] < F) & (rb < RB)
        weight = tl.load(b_at, mask=b_inside, other=0.0)
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        g = tl.dot(mine, tl.trans(weight), g, input_precision="ieee")
        weight = tl.load(b_at + F * b_row, mask=b_inside, other=0.0)
        u = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
        u = tl.dot(mine, tl.trans(weight), u, input_precision="ieee")
        made = (g / (1.0 + tl.exp(-g)) * u).to(inner.dtype.element_ty)
        tl.store(inner + m * F + f[None, :], made, mask=inside)
        x = tl.load(a + ra[:, None] * F + f[None, :], mask=(ra[:, None] < RA) & (f[None, :] < F), other=0.0)
        total = tl.dot(made, tl.trans(x), total, input_precision="ieee")
    place = sums + (tl.program_id(1) * M + m) * RA + ra[None, :]
    tl.store(place, total, mask=(m < M) & (ra[None, :] < RA))


def chunk_of(inner: int) -> int:
    """Columns, or on the way back tokens, whose sums are made at once: enough programs for small models, few sums for
    large ones."""
    return 512 if inner < 8192 else 1024


def swiglu(
    gate_up_MG: torch.Tensor,
    t_MR: torch.Tensor,
    b_GR: torch.Tensor,
    a_RF: torch.Tensor,
    inner_MF: torch.Tensor,
    t_down_MR: torch.Tensor,
) -> None:
    m, f = inner_MF.shape
    (bm, bf, warps), chunk = SWIGLU, chunk_of(f)
    ranks_b, ranks_a = t_MR.shape[1], len(a_RF)
    sums_SMR = torch.empty(triton.cdiv(f, chunk), m, ranks_a, dtype=torch.float32, device=inner_MF.device)
    with on(inner_MF.device):
        _swiglu[(triton.cdiv(m, bm), len(sums_SMR))](
            gate_up_MG, t_MR, b_GR, a_RF, inner_MF, sums_SMR, t_MR.stride(0), b_GR.stride(0), f, m, ranks_b, ranks_a,
            chunk, bm, bf, triton.next_power_of_2(ranks_b), triton.next_power_of_2(ranks_a), num_warps=warps,
        )  # fmt: skip
    t_down_MR.copy_(sums_SMR.sum(0))


@triton.jit
def _swiglu_backward(
    gate_up, t, b, dinner, dt, a, sums_b, sums_a, t_row, b_row, dt_row, F, M, RB, RA, GROUP: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, RANKS_B: tl.constexpr, RANKS_A: tl.constexpr,
):  # fmt: skip
    """BF columns of a group of tokens: their gradient, in place, and the group's part of three products of adapters."""
    f, group = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1)
    rb, ra = tl.arange(0, RANKS_B)[None, :], tl.arange(0, RANKS_A)[None, :]
    gate_b, up_b = tl.zeros([BF, RANKS_B], tl.float32), tl.zeros([BF, RANKS_B], tl.float32)
    down_a = tl.zeros([BF, RANKS_A], tl.float32)
    kind = gate_up.dtype.element_ty
    b_at, b_inside = b + f[:, None].to(tl.int64) * b_row + rb, (f[:, None] < F) & (rb < RB)
    gate_weight = tl.load(b_at, mask=b_inside, other=0.0)
    up_weight = tl.load(b_at + F * b_row, mask=b_inside, other=0.0)
    a_inside = (f[:, None] < F) & (ra < RA)
    down_weight = tl.load(a + ra * F + f[:, None], mask=a_inside, other=0.0)
    for start in range(0, GROUP, BM):
        m = group.to(tl.int64) * GROUP + start + tl.arange(0, BM)[:, None]
        inside = (m < M) & (f[None, :] < F)
        x = tl.load(t + m * t_row + rb, mask=(m < M) & (rb < RB), other=0.0)
        dx = tl.load(dt + m * dt_row + ra, mask=(m < M) & (ra < RA), other=0.0)
        at = gate_up + m * 2 * F + f[None, :]
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        g = tl.dot(x, tl.trans(gate_weight), g, input_precision="ieee")
        u = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
        u = tl.dot(x, tl.trans(up_weight), u, input_precision="ieee")
        dm = tl.load(dinner + m * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
        dm = tl.dot(dx, tl.trans(down_weight), dm, input_precision="ieee")
        half = 1.0 / (1.0 + tl.exp(-g))
        act = g * half
        dg, du = (dm * u * (half + act * (1.0 - half))).to(kind), (dm * act).to(kind)
        tl.store(at, dg, mask=inside)
        tl.store(at + F, du, mask=inside)
        gate_b = tl.dot(tl.trans(dg), x, gate_b, input_precision="ieee")
        up_b = tl.dot(tl.trans(du), x, up_b, input_precision="ieee")
        down_a = tl.dot(tl.trans((act * u).to(kind)), dx, down_a, input_precision="ieee")
    to_b = sums_b + (group * 2 * F + f[:, None]) * RB + rb
    tl.store(to_b, gate_b, mask=b_inside)
    tl.store(to_b + F * RB, up_b, mask=b_inside)
    tl.store(sums_a + (group * RA + ra) * F + f[:, None], down_a, mask=a_inside)


def swiglu_backward(
    gate_up_MG: torch.Tensor,
    t_MR: torch.Tensor,
    b_GR: torch.Tensor,
    dinner_MF: torch.Tensor,
    dt_MR: torch.Tensor,
    a_RF: torch.Tensor,
    db_GR: torch.Tensor,
    da_RF: torch.Tensor,
) -> None:
    m, f = dinner_MF.shape
    (bm, bf, warps), group = SWIGLU_BACKWARD, chunk_of(f)
    ranks_b, ranks_a = t_MR.shape[1], dt_MR.shape[1]
    groups = triton.cdiv(m, group)
    sums_b, sums_a = (
        torch.empty(groups, *shape, dtype=torch.float32, device=gate_up_MG.device)
        for shape in (db_GR.shape, da_RF.shape)
    )
    with on(gate_up_MG.device):
        _swiglu_backward[(triton.cdiv(f, bf), groups)](
            gate_up_MG, t_MR, b_GR, dinner_MF, dt_MR, a_RF, sums_b, sums_a, t_MR.stride(0), b_GR.stride(0),
            dt_MR.stride(0), f, m, ranks_b, ranks_a, group, bm, bf, triton.next_power_of_2(ranks_b),
            triton.next_power_of_2(ranks_a), num_warps=warps,
        )  # fmt: skip
    torch.sum(sums_b, 0, out=db_GR)
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
