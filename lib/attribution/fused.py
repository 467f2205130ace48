"""The rules' element-wise work, and scores of a layer, as one Triton kernel each: nothing is written but results.

Suffixes: B samples, T tokens of a sample, J outputs of a layer, I its inputs, D hidden, C chunks."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from lib.attribution.memory import GRADIENT_VALUES
from lib.models.decoder import on


@triton.jit
def _norm_forward(x, w, out, scale, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    v = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    tl.store(scale + row, r)
    n = (v * r).to(x.dtype.element_ty).to(tl.float32)  # rounded where the plain code rounds
    tl.store(out + row * D + at, n * tl.load(w + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _norm_backward(dy, w, scale, dx, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    g = tl.load(dy + row * D + at, mask=inside, other=0.0).to(tl.float32)
    g = g * tl.load(w + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(dx + row * D + at, g, mask=inside)


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows, block = x.numel() // width, triton.next_power_of_2(width)
        out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        with on(x.device):
            _norm_forward[(rows,)](x, weight_D, out, scale, width, eps, BLOCK=block, num_warps=8)
        ctx.save_for_backward(weight_D, scale)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_D, scale = ctx.saved_tensors
        dy = dy.contiguous()
        width = dy.shape[-1]
        dx, block = torch.empty_like(dy), triton.next_power_of_2(width)
        with on(dy.device):
            _norm_backward[(len(scale),)](dy, weight_D, scale, dx, width, BLOCK=block, num_warps=8)
        return dx, None, None


@triton.jit
def _gated_forward(gate, up, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    act = (g / (1.0 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + at, act * tl.load(up + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _gated_backward(gate, up, dm, dgate, dup, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    half = tl.load(dm + at, mask=inside, other=0.0).to(tl.float32) * 0.5
    slope = 1.0 / (1.0 + tl.exp(-g))  # silu(g) / g
    tl.store(dgate + at, half * u * slope, mask=inside)
    tl.store(dup + at, half * g * slope, mask=inside)


class Gated(torch.autograd.Function):
    """silu(gate) * up; see rules.Gated for the gradient's meaning."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        with on(gate.device):
            _gated_forward[(triton.cdiv(gate.numel(), 4096),)](gate, up, out, gate.numel(), BLOCK=4096, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, dm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dm, dgate, dup = dm.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        with on(gate.device):
            _gated_backward[(triton.cdiv(gate.numel(), 4096),)](
                gate, up, dm, dgate, dup, gate.numel(), BLOCK=4096, num_warps=8
            )
        return dgate, dup


@triton.jit
def _rotate(
    x, cos, sin, out, T, FACTOR, sb, st, sh, cb,
    H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """One token a program, all its heads; out is [B, T, H, 2 HALF], each head the sum of GROUP heads of x. WAY 1: rope,
    -1: its transpose, 0: no rotation."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = head < H
    base = x + b * sb + t * st + head * GROUP * sh + at
    p, q = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    for g in tl.static_range(GROUP):
        p += tl.load(base + g * sh, mask=inside, other=0.0).to(tl.float32)
        q += tl.load(base + g * sh + HALF, mask=inside, other=0.0).to(tl.float32)
    if WAY != 0:
        place = b * cb + t * 2 * HALF + at
        c1, c2 = tl.load(cos + place).to(tl.float32), tl.load(cos + place + HALF).to(tl.float32)
        s1, s2 = tl.load(sin + place).to(tl.float32), tl.load(sin + place + HALF).to(tl.float32)
        if WAY == 1:
            p, q = p * c1 - q * s1, q * c2 + p * s2
        else:
            p, q = p * c1 + q * s2, q * c2 - p * s1
    to = out + token * (H * 2 * HALF) + head * (2 * HALF) + at
    tl.store(to, p * FACTOR, mask=inside)
    tl.store(to + HALF, q * FACTOR, mask=inside)


def rotate(
    x_BTHd: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    way: int,
    factor: float = 1.0,
    heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`heads`: of the result, each the sum of as many neighbours."""
    samples, tokens, given, width = x_BTHd.shape
    heads = heads or given
    out = torch.empty(samples, tokens, heads, width, dtype=dtype or x_BTHd.dtype, device=x_BTHd.device)
    step = 0 if len(cos) == 1 else cos.stride(0)
    with on(x_BTHd.device):
        _rotate[(samples * tokens,)](
            x_BTHd, cos, sin, out, tokens, factor, *x_BTHd.stride()[:3], step,
            heads, width // 2, triton.next_power_of_2(heads), given // heads, way, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _dots(x, y, length, out, T, J, RAGGED: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr):
    """Sum over ROWS tokens of x * y; a chunk of a sample's tokens a program. RAGGED: only its first `length` count."""
    b, chunk = tl.program_id(0), tl.program_id(1)
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)
    real = tl.load(length + b) if RAGGED else T
    total = tl.zeros([BT, BJ], tl.float32)
    for start in range(0, ROWS, BT):
        t = chunk * ROWS + start + tl.arange(0, BT)
        inside = (t[:, None] < real) & (j[None, :] < J)
        at = (b.to(tl.int64) * T + t[:, None]) * J + j[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += v * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.num_programs(1)
    tl.store(out + (b.to(tl.int64) * chunks + chunk) * J + j, tl.sum(total, 0), mask=j < J)


def dots(x_BTJ: torch.Tensor, y_BTJ: torch.Tensor, length_B: torch.Tensor | None = None) -> torch.Tensor:
    """sum_t x * y over a sample's tokens, or its real ones, float32 [B, J]."""
    samples, tokens, width = x_BTJ.shape
    rows = min(64, triton.next_power_of_2(tokens))
    part_BCJ = torch.empty(samples, triton.cdiv(tokens, rows), width, dtype=torch.float32, device=x_BTJ.device)
    with on(x_BTJ.device):
        _dots[(*part_BCJ.shape[:2], triton.cdiv(width, 256))](
            x_BTJ, y_BTJ, x_BTJ if length_B is None else length_B, part_BCJ, tokens, width,
            RAGGED=length_B is not None, ROWS=rows, BT=min(16, rows), BJ=256, num_warps=4,
        )  # fmt: skip
    return part_BCJ.sum(1)


@triton.jit
def _score(
    x, dy, w, out, B, T, J, I,
    NEURON: tl.constexpr, ABS: tl.constexpr, EVEN: tl.constexpr,
    BJ: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of a weight matrix: the gradient of each sample stays in registers, is multiplied by the weights, and
    is summed over a row of the tile (NEURON: out[B, tiles of I, J]) or over the samples (out[J, I] grows by it).
    EVEN: no mask is needed over T."""
    tiles_j, tiles_i = tl.cdiv(J, BJ), tl.cdiv(I, BI)
    pid = tl.program_id(0)  # tiles in groups of rows, so that a group's inputs stay in the cache
    first = pid // (GROUP * tiles_i) * GROUP
    size = tl.minimum(tiles_j - first, GROUP)
    pj, pi = first + pid % (GROUP * tiles_i) % size, pid % (GROUP * tiles_i) // size
    j, i = pj * BJ + tl.arange(0, BJ), pi * BI + tl.arange(0, BI)
    jj, ii = j % J, i % I  # beyond the edge: any value that exists; masked at the end
    weight = tl.load(w + pj.to(tl.int64) * BJ * I + (jj - pj * BJ)[:, None] * I + ii[None, :])
    if not NEURON:
        total = tl.zeros([BJ, BI], tl.float32)
    for _ in range(0, B):
        g = tl.zeros([BJ, BI], tl.float32)
        t = tl.arange(0, BT)
        a_at, c_at = dy + t[:, None] * J + jj[None, :], x + t[:, None] * I + ii[None, :]
        for start in range(0, T, BT):
            if EVEN:
                a, c = tl.load(a_at), tl.load(c_at)
            else:
                real = t[:, None] < T - start
                a, c = tl.load(a_at, mask=real, other=0.0), tl.load(c_at, mask=real, other=0.0)
            g = tl.dot(tl.trans(a), c, g, input_precision="ieee")
            a_at += BT * J
            c_at += BT * I
        r = weight.to(tl.float32) * g
        if ABS:
            r = tl.abs(r)
        if NEURON:
            line = tl.sum(tl.where(i[None, :] < I, r, 0.0), 1)
            tl.store(out + pi * J + j, line, mask=j < J)
            out += tiles_i * J
        else:
            total += r
        dy += T * J
        x += T * I
    if not NEURON:
        inside = (j[:, None] < J) & (i[None, :] < I)
        at = out + pj.to(tl.int64) * BJ * I + (j - pj * BJ)[:, None] * I + i[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def _launch(
    x_BTI: torch.Tensor,
    dy_BTJ: torch.Tensor,
    weight_JI: torch.Tensor,
    out: torch.Tensor,
    neuron: bool,
    magnitude: bool,
    tile: tuple[int, int, int, int, int],
) -> None:
    samples, tokens, inputs = x_BTI.shape
    outputs = dy_BTJ.shape[-1]
    bj, bi, bt, warps, stages = tile
    grid = (triton.cdiv(outputs, bj) * triton.cdiv(inputs, bi),)
    with on(x_BTI.device):
        _score[grid](
            x_BTI, dy_BTJ, weight_JI, out, samples, tokens, outputs, inputs,
            NEURON=neuron, ABS=magnitude, EVEN=tokens % bt == 0, BJ=bj, BI=bi, BT=bt, GROUP=8,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def tile_for(tokens: int, small: bool) -> tuple[int, int, int, int, int]:
    """(J, I, T) of a tile, warps, stages: the fastest of ten at 14336 x 4096 on an H200, for 64 samples of 32 tokens
    1.7 ms, for one of 2,048 tokens 0.38 ms (0.36 is the product alone by the vendor's library)."""
    if tokens <= 64:
        return 64, 128, max(16, triton.next_power_of_2(tokens)), 4, 2
    return (128, 128, 32, 8, 3) if small else (128, 256, 64, 8, 3)


@cache
def small(device: torch.device) -> bool:
    """Whether its shared memory is that of a workstation's card (99 KiB), not of a data centre's (163 KiB and more)."""
    if device.type != "cuda":
        return False
    room = torch.cuda.get_device_properties(device)
    return room.shared_memory_per_block_optin < 140_000  # pyrefly: ignore[missing-attribute]: not in torch's stubs


def abs_neurons(x_BTI: torch.Tensor, dy_BTJ: torch.Tensor, weight_JI: torch.Tensor) -> torch.Tensor:
    """sum_i |W_ji G_ji| of each sample, float32 [B, J]."""
    samples, tokens, inputs = x_BTI.shape
    tile = tile_for(tokens, small(x_BTI.device))
    parts = triton.cdiv(inputs, tile[1])
    part_BCJ = torch.empty(samples, parts, dy_BTJ.shape[-1], dtype=torch.float32, device=x_BTI.device)
    _launch(x_BTI, dy_BTJ, weight_JI, part_BCJ, True, True, tile)
    return part_BCJ.sum(1)


@triton.jit
def _grow(total, g, w, S, N, ABS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    sum = tl.load(total + at, mask=inside, other=0.0)
    for _ in range(0, S):
        r = weight * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if ABS:
            r = tl.abs(r)
        sum += r
        g += N
    tl.store(total + at, sum, mask=inside)


def add_weights(
    total_JI: torch.Tensor, x_BTI: torch.Tensor, dy_BTJ: torch.Tensor, weight_JI: torch.Tensor, magnitude: bool
) -> None:
    """total += sum over samples of W * G, or of |W * G|. Gradients of long samples are made by the vendor's product,
    rounded to the weights' type as autograd's own are, several samples to one pass over the totals: 420 us a sample at
    14336 x 4096 and 2,048 tokens on an H200, where 360 are the product; one kernel with all inside takes 490."""
    tokens = x_BTI.shape[1]
    if tokens <= 64:
        _launch(x_BTI, dy_BTJ, weight_JI, total_JI, False, magnitude, tile_for(tokens, False))
        return
    count = weight_JI.numel()
    step = max(1, GRADIENT_VALUES // count)
    for x, dy in zip(x_BTI.split(step), dy_BTJ.split(step), strict=True):
        g_BJI = torch.bmm(dy.transpose(1, 2), x)
        with on(x.device):
            _grow[(triton.cdiv(count, 2048),)](
                total_JI, g_BJI, weight_JI, len(x), count, ABS=magnitude, BLOCK=2048, num_warps=8
            )
