"""A step's activations, made once: the same addresses for every micro-batch, whatever its size.

Suffixes as in base; M tokens, P predictions, V words, H heads, K layers that keep what they computed."""

from dataclasses import dataclass
from typing import Any

import torch

from lib.checkpoint.families import Shape
from lib.lora.base import Base, Ranks
from lib.models.plain_ops import accurate

HEAD_ROWS = 2048  # predictions whose logits exist at once


@dataclass(frozen=True)
class Size:
    """Of the largest micro-batch."""

    tokens: int
    predictions: int
    recompute: bool  # layers keep their input alone, and compute the rest again on the way back

    def kept(self, shape: Shape, rank: int, itemsize: int) -> int:
        """Bytes of what stays of a micro-batch until its way back."""
        s, ranks = shape, Ranks(rank)
        layers = 0 if self.recompute else s.layers
        width = layers * self._layer(shape, rank, itemsize)
        return self.tokens * (width + ((s.layers + 1) * s.hidden + s.layers * ranks.one) * itemsize)

    def bytes(self, shape: Shape, rank: int, itemsize: int) -> int:
        """What a Space of this size takes."""
        s, ranks, q = shape, Ranks(rank), shape.heads * shape.head
        passing = (s.hidden + ranks.one + s.hidden + ranks.qkv + s.inner + s.qkv + q) * itemsize + 4 * s.heads
        if self.recompute:
            passing += self._layer(shape, rank, itemsize)
        head = min(HEAD_ROWS, self.predictions) * s.vocabulary * itemsize
        predictions = self.predictions * (4 * s.hidden * itemsize + 4)
        return self.kept(shape, rank, itemsize) + self.tokens * passing + predictions + head

    @staticmethod
    def _layer(shape: Shape, rank: int, itemsize: int) -> int:
        """Of what a layer computes for its way back, a token."""
        s, ranks, q = shape, Ranks(rank), shape.heads * shape.head
        width = 3 * s.hidden + ranks.qkv + ranks.gate_up + ranks.one + s.qkv + q + 2 * s.inner
        return width * itemsize + 4 * s.heads


class Kept:
    """What a layer needs of its forward pass on the way back. `beside`: another micro-batch's, which shares the one
    layer's of those that are computed again."""

    def __init__(self, base: Base, size: Size, beside: "Kept | None" = None) -> None:
        s, ranks, q = base.shape, Ranks(base.rank), base.shape.heads * base.shape.head
        layers = 1 if size.recompute else s.layers

        def make(width: int, dtype: torch.dtype = base.dtype, layers: int = layers) -> torch.Tensor:
            return torch.zeros(layers, size.tokens, width, dtype=dtype, device=base.device)

        if beside and size.recompute:
            vars(self).update(vars(beside))
        else:
            self.normed1_KMD, self.normed2_KMD = make(s.hidden + ranks.qkv), make(s.hidden + ranks.gate_up)
            self.qkv_KMX, self.attended_KMQ, self.lse_KMH = make(s.qkv), make(q), make(s.heads, accurate(base.dtype))
            self.middle_KMD, self.gate_up_KMG = make(s.hidden), make(2 * s.inner)
            self.t_o_KMR = make(ranks.one)
        self.t_down_LMR = make(ranks.one, layers=s.layers)


class Space:
    """Of one micro-batch. `beside`: another one's of the same stage, with which it shares what no layer keeps."""

    def __init__(self, base: Base, size: Size, beside: "Space | None" = None) -> None:
        s, ranks, q = base.shape, Ranks(base.rank), base.shape.heads * base.shape.head

        def make(*shape: int, dtype: torch.dtype = base.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=base.device)

        tokens, places = size.tokens, size.predictions
        if beside:
            vars(self).update(vars(beside))
        else:
            self.g_MD, self.dnormed_MD = make(tokens, s.hidden + ranks.one), make(tokens, s.hidden + ranks.qkv)
            self.inner_MF, self.dqkv_MX, self.dattended_MQ = make(tokens, s.inner), make(tokens, s.qkv), make(tokens, q)
            self.delta_MH = make(tokens, s.heads, dtype=accurate(base.dtype))
            self.picked_PD, self.hidden_PD, self.dhidden_PD, self.dpicked_PD = (
                make(places, s.hidden) for _ in range(4)
            )
            self.logits_PV = make(min(HEAD_ROWS, places), s.vocabulary)
            self.loss_P = make(places, dtype=accurate(base.dtype))
        self.kept = Kept(base, size, beside.kept if beside else None)
        self.x_LMD = make(s.layers + 1, tokens, s.hidden)
        # What a micro-batch is, as the kernels read it
        self.cos_Md, self.sin_Md = (make(tokens, s.head, dtype=base.rope[0].dtype) for _ in range(2))
        self.where_P, self.target_P = (make(places, dtype=torch.int64) for _ in range(2))
        self.share = make(1, dtype=accurate(base.dtype))
        self.segments: dict[int, Any] = {}  # of micro-batches of so many tokens
