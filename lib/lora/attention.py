"""Causal attention of rows laid end to end, forwards and backwards, each row over itself; sums in a fixed order.

Query rows are (position, query head of those that share a key head), so that short rows fill a tile.

Suffixes as in plain_ops."""

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
# the fastest of some dozens on an H100 at the shapes of 0.5B and 7B: 30, 41, 57 and 86, 130, 139 us.
ATTEND, ATTEND_Q, ATTEND_KV = (64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3)


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
