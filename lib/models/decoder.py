"""A decoder of Llama's shape for scoring: no cache pool, no padding, no logits but those that are asked for.

q, k, v are one matrix product and gate, up another; the residual is added inside the products that feed it. On a GPU
the rest is one kernel each (triton_ops); on a CPU, and in a higher precision, plain torch (plain_ops). The layers may
lie on several devices: batches then follow each other through them, so that all are busy.

Suffixes: M tokens of a batch, D hidden, X any width, H heads, K key heads, d head width, N keys, P predictions,
V words."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib.base.errors import UserError
from lib.checkpoint.families import Shape
from lib.models import plain_ops
from lib.models.low_rank import LowRank, Pair, add_low_rank
from lib.models.packing import Batch, prefix_batch
from lib.models.tokens import must_know

PIECE_VALUES = 1 << 26  # of a weight, converted at once: 256 MiB in float32


@dataclass
class Layer:
    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    norm2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor] | None = None  # of each head's query and key

    @property
    def device(self) -> torch.device:
        return self.qkv.device


@dataclass
class Weights:
    embedding: torch.Tensor  # may stay in host memory: only its rows are looked up
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens that all rows begin with."""

    length: int
    cache: list[torch.Tensor]  # of each layer, [2, P, K, d]


@dataclass(frozen=True)
class Workspace:
    """A device's activations, made once: the same addresses for every batch."""

    x: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    inner: torch.Tensor

    @staticmethod
    def empty(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> "Workspace":
        def make(*size: int) -> torch.Tensor:
            return torch.zeros(tokens, *size, dtype=dtype, device=device)

        heads = shape.heads, shape.head
        wide, inner = make(2 * shape.inner), make(shape.inner)
        return Workspace(
            make(shape.hidden), make(shape.hidden), make(shape.qkv), make(*heads), make(*heads), wide, inner
        )

    def first(self, tokens: int) -> "Workspace":
        return Workspace(**{name: one[:tokens] for name, one in vars(self).items()})

    @staticmethod
    def bytes(shape: Shape, tokens: int, itemsize: int = 2) -> int:
        width = 2 * shape.hidden + shape.qkv + 2 * shape.heads * shape.head + 3 * shape.inner
        return tokens * width * itemsize


class Decoder:
    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch_tokens: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shape, self.weights, self.batch_tokens = shape, weights, batch_tokens
        self.dtype = dtype or weights.head.dtype
        self.devices = list(dict.fromkeys(layer.device for layer in weights.layers))
        self.fused = self.devices[0].type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        self.table, self.positions = rope, len(rope[0])
        self.rope = {d: (rope[0].to(d), rope[1].to(d)) for d in self.devices}
        self.space: dict[torch.device, Workspace] = {}
        self.adapter: list[LowRank] = []  # of each layer; none: the model itself
        if self.fused:
            from lib.models import triton_ops

            self.ops: Any = triton_ops
        else:
            self.ops = plain_ops

    def higher(self) -> "Decoder":
        """The same weights computed with in the next higher precision, converted piece by piece; slow, for samples."""
        dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        wide = (self.table[0].to(plain_ops.accurate(dtype)), self.table[1].to(plain_ops.accurate(dtype)))
        return Decoder(self.shape, self.weights, wide, self.batch_tokens, dtype)

    @torch.inference_mode()
    def prefix(self, ids: list[int]) -> Prefix:
        """Keys and values of a prefix, computed once."""
        cache: list[torch.Tensor] = []
        if ids:
            self._forward(prefix_batch(ids), None, keep=cache)
        return Prefix(len(ids), cache)

    @torch.inference_mode()
    def hidden(self, batch: Batch, prefix: Prefix) -> torch.Tensor:
        """Normed hidden states [P, D] at the batch's predicting positions, on the last device. Does not wait for it."""
        x_MD = self._forward(batch, prefix)
        where = to_device(batch.where, x_MD.device)
        picked_PD = x_MD[where]
        out_PD = torch.empty_like(picked_PD)
        with on(x_MD.device):
            self.ops.rms_norm(picked_PD, self.weights.norm, self.shape.eps, out_PD)
        return out_PD

    @torch.inference_mode()
    def log_probs(self, hidden_PD: torch.Tensor, targets: np.ndarray, block: int) -> torch.Tensor:
        """log p(target) for each state, in blocks of a fixed number of states."""
        count = len(targets)
        must_know(int(targets.min()), int(targets.max()), self.shape.vocabulary)
        pad = -count % block
        hidden_PD = torch.cat([hidden_PD, hidden_PD.new_zeros(pad, hidden_PD.shape[1])])
        target_P = to_device(np.pad(targets, (0, pad)), hidden_PD.device)
        parts, logits_PV = [], hidden_PD.new_empty(block, self.shape.vocabulary)
        for i in range(0, count, block):
            matmul(hidden_PD[i : i + block], self.weights.head, logits_PV)
            with on(logits_PV.device):
                parts.append(self.ops.log_prob(logits_PV, target_P[i : i + block]))
        return torch.cat(parts)[:count]

    def _forward(self, batch: Batch, prefix: Prefix | None, keep: list[torch.Tensor] | None = None) -> torch.Tensor:
        m, device = len(batch.ids), self.devices[0]
        must_know(int(batch.ids.min()), int(batch.ids.max()), self.shape.vocabulary)
        if batch.positions.max() >= self.positions:
            raise UserError(f"a row has {batch.positions.max() + 1} tokens, and the model {self.positions} positions")
        space, plan = self._space(device, m), _Plan(batch, device, self)
        space.x.copy_(self._embed(batch.ids, device), non_blocking=True)
        for number, layer in enumerate(self.weights.layers):
            if layer.device != device:
                device, before = layer.device, space.x
                space, plan = self._space(device, m), _Plan(batch, device, self)
                space.x.copy_(before, non_blocking=True)
            cached = prefix.cache[number] if prefix and prefix.length else None
            with on(device):
                kv = self._layer(layer, space, plan, cached, self.adapter[number] if self.adapter else None)
            if keep is not None:
                keep.append(kv)
        return space.x

    def _layer(
        self, w: Layer, s: Workspace, plan: "_Plan", cached: torch.Tensor | None, low: LowRank | None
    ) -> torch.Tensor:
        """One layer, in place on s.x; returns the keys and values of the batch's own tokens."""
        shape, ops = self.shape, self.ops
        ops.rms_norm(s.x, w.norm1, shape.eps, s.normed)
        matmul(s.normed, w.qkv, s.qkv, w.qkv_bias)
        if low:
            add_low_rank(s.qkv, s.normed, low.qkv)
        if w.head_norms is not None:
            self._norm_heads(w.head_norms, s.qkv)
        kv = torch.empty(2, len(s.x), shape.kv_heads, shape.head, dtype=s.x.dtype, device=s.x.device)
        ops.split_qkv(s.qkv, s.q, kv[0], kv[1], plan.cos, plan.sin)
        ops.attend(s.q, kv, cached, plan.parts, s.attended)
        add_matmul(s.x, s.attended.flatten(1), w.o, low.o if low else None)
        ops.rms_norm(s.x, w.norm2, shape.eps, s.normed)
        matmul(s.normed, w.gate_up, s.gate_up)
        if low:
            add_low_rank(s.gate_up, s.normed, low.gate_up)
        ops.swiglu(s.gate_up, s.inner)
        add_matmul(s.x, s.inner, w.down, low.down if low else None)
        return kv

    def _norm_heads(self, norms: tuple[torch.Tensor, torch.Tensor], qkv_MX: torch.Tensor) -> None:
        heads, kv, d = self.shape.heads, self.shape.kv_heads, self.shape.head
        for weight_d, part_MX in zip(norms, qkv_MX.split([heads * d, kv * d, kv * d], -1)[:2], strict=True):
            rows = part_MX.reshape(-1, d)  # a copy, one head a row
            self.ops.rms_norm(rows, weight_d, self.shape.eps, rows)
            part_MX.copy_(rows.view(part_MX.shape))

    def _space(self, device: torch.device, tokens: int) -> Workspace:
        if device not in self.space or tokens > len(self.space[device].x):
            most = max(tokens, self.batch_tokens)
            self.space[device] = Workspace.empty(self.shape, most, self.dtype, device)
        return self.space[device].first(tokens)

    def _embed(self, ids: np.ndarray, device: torch.device) -> torch.Tensor:
        table = self.weights.embedding
        rows = table[to_device(ids, table.device)]
        return rows.pin_memory() if table.device != device and device.type == "cuda" else rows


def matmul(x_MD: torch.Tensor, w_XD: torch.Tensor, out_MX: torch.Tensor, bias_X: torch.Tensor | None = None) -> None:
    """out = x @ w.T (+ bias). Weights of another type are converted in pieces that fit beside them."""
    if w_XD.dtype != x_MD.dtype:
        step = max(1, PIECE_VALUES // w_XD.shape[1])
        for i in range(0, len(w_XD), step):
            out_MX[:, i : i + step] = x_MD @ w_XD[i : i + step].to(x_MD.dtype).t()
        if bias_X is not None:
            out_MX += bias_X
    elif bias_X is None:
        torch.mm(x_MD, w_XD.t(), out=out_MX)
    else:
        torch.addmm(bias_X, x_MD, w_XD.t(), out=out_MX)


def add_matmul(x_MD: torch.Tensor, y_MX: torch.Tensor, w_DX: torch.Tensor, low: Pair | None = None) -> None:
    """x += y @ w.T, added inside the product where the types allow. With an adapter, whose part would be rounded away
    if it were added to x alone: after it has been added to the product."""
    if w_DX.dtype == x_MD.dtype and not low:
        x_MD.addmm_(y_MX, w_DX.t())
        return
    product = torch.empty_like(x_MD)
    matmul(y_MX, w_DX, product)
    if low:
        add_low_rank(product, y_MX, low)
    x_MD += product


class _Plan:
    """A batch's index arrays on one device."""

    def __init__(self, batch: Batch, device: torch.device, decoder: Decoder) -> None:
        cos, sin = decoder.rope[device]
        positions = to_device(batch.positions, device)
        self.cos, self.sin = cos[positions], sin[positions]
        if decoder.fused:
            group = decoder.shape.heads // decoder.shape.kv_heads
            self.parts: Any = to_device(decoder.ops.tiles(batch.segments, group), device)
        else:
            self.parts = batch.segments.tolist()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A kernel of ours is launched on the current device, not on its arguments'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
