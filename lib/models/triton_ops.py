"""The same operations as one kernel each, so that a layer moves the fewest bytes besides its matrix products."""

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm(x, w, out, out_row, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    v = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    tl.store(out + row * out_row + at, v * scale * tl.load(w + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """`out` may be columns of something wider."""
    rows, width = x_MD.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x_MD, weight_D, out, out.stride(0), width, eps, BLOCK=block, num_warps=8 if block > 2048 else 4)


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


@triton.jit
def _log_sums(logits, marked, whole, part, V, BLOCK: tl.constexpr):
    """As _log_prob, of all words and of those that are marked."""
    row = tl.program_id(0).to(tl.int64)
    top, top_m = tl.full([BLOCK], -1e30, tl.float32), tl.full([BLOCK], -1e30, tl.float32)
    total, total_m = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        counts = tl.load(marked + at, mask=at < V, other=0) != 0
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        x = tl.where(counts, x, float("-inf"))
        higher = tl.maximum(top_m, x)
        total_m = total_m * tl.exp(top_m - higher) + tl.exp(x - higher)
        top_m = higher
    peak, peak_m = tl.max(top, 0), tl.max(top_m, 0)
    tl.store(whole + row, peak + tl.log(tl.sum(total * tl.exp(top - peak), 0)))
    tl.store(part + row, peak_m + tl.log(tl.sum(total_m * tl.exp(top_m - peak_m), 0)))


def log_sums(logits_PV: torch.Tensor, marked_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits_PV.shape
    whole, part = (torch.empty(rows, dtype=torch.float32, device=logits_PV.device) for _ in range(2))
    _log_sums[(rows,)](logits_PV, marked_V.view(torch.uint8), whole, part, vocabulary, BLOCK=4096, num_warps=8)
    return whole, part


# Query rows of a program (positions times the query heads that share a key head) and keys a step: the fastest of 36
# settings on an H200 at the shapes of 0.5B, 7B and 72B, 1.4 times as fast as 128 and 64.
TILE, KEYS_STEP = 64, 32


def tiles(segments: np.ndarray, group: int) -> np.ndarray:
    """int32 [T, 5]: (start, length, parent, before) of the tile's segment, and the tile's first row."""
    counts = -(-segments[:, 1] * group // TILE)
    which = np.repeat(np.arange(len(segments)), counts)
    first = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([segments[which], (first * TILE)[:, None]], 1).astype(np.int32)


@triton.jit
def _attend(
    q,
    kv,
    prefix,
    tile,
    out,
    scale,
    P,
    M,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One tile of one segment under one key head. Rows are (position, query head of the group), so that short segments
    fill the tile. Keys are the prefix, the parent and the segment itself, in one row of numbers 0..P+before+length."""
    at = tile + tl.program_id(0) * 5
    start, length, parent, before, first = (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
    )  # fmt: skip
    head = tl.program_id(1)
    row = first + tl.arange(0, ROWS)
    position, lane = row // G, row % G
    inside = position < length
    d = tl.arange(0, D)
    query = (start + position).to(tl.int64) * (K * G * D) + (head * G + lane) * D
    x = tl.load(q + query[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    last = tl.minimum((first + ROWS - 1) // G, length - 1)
    for begin in range(0, P + before + last + 1, KEYS):
        j = begin + tl.arange(0, KEYS)
        own = j - P - before
        token = tl.where(j < P + before, parent + j - P, start + own).to(tl.int64)
        exists = own < length
        key = tl.where(j < P, prefix + j.to(tl.int64) * (K * D), kv + token * (K * D)) + head * D
        value = key + tl.where(j < P, P, M).to(tl.int64) * (K * D)
        k = tl.load(key[:, None] + d[None, :], mask=exists[:, None], other=0.0)
        v = tl.load(value[:, None] + d[None, :], mask=exists[:, None], other=0.0)
        s = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(exists[None, :] & (own[None, :] <= position[:, None]), s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        keep = tl.exp(top - higher)
        total = total * keep + tl.sum(p, 1)
        sums = sums * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    tl.store(out + query[:, None] + d[None, :], sums / total[:, None], mask=inside[:, None])


def attend(
    q_MHd: torch.Tensor, kv: torch.Tensor, prefix: torch.Tensor | None, tile_T5: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of each segment over the prefix, its parent and itself; kv and prefix: [2, tokens, K, d]."""
    heads, d = q_MHd.shape[1:]
    kv_heads = kv.shape[2]
    before = 0 if prefix is None else prefix.shape[1]
    _attend[(len(tile_T5), kv_heads)](
        q_MHd, kv, kv if prefix is None else prefix, tile_T5, out, d**-0.5, before, kv.shape[1],
        kv_heads, heads // kv_heads, d, TILE, KEYS_STEP, num_warps=4, num_stages=2,
    )  # fmt: skip
