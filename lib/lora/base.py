"""A base model with room for one adapter in its own matrices.

An adapter's products are thin, and each of them alone would read or write a layer's widest activations once more. So
A and B stand beside the weights they belong to, and the base's own products make the adapter's with them:

    qkv, gate_up (wide results):   [x | t] [W | B]^T = x W^T + t B^T           with t = x A^T beside x
                                   dy [W | B] = [dy W | dt]
    o, down (wide inputs):         [dy | dt] [W over A] = dy W + dt A          with dt = dy B beside dy

The scale alpha / r is inside B. Columns and rows are filled up to a multiple of 16 with zeros.

Suffixes: L layers, D hidden, X q, k and v, Q heads times width, F inner, G gate and up, r rank, R filled up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.base.errors import UserError
from lib.checkpoint.families import Family, Shape, family_of
from lib.lora.batches import round_up
from lib.models.decoder import Layer, Weights
from lib.models.load import load_config, visible_devices
from lib.models.rope import rope_table
from lib.models.weights import fill

FILL = 16  # of ranks


@dataclass(frozen=True)
class Ranks:
    rank: int

    @property
    def qkv(self) -> int:
        return -(-3 * self.rank // FILL) * FILL

    @property
    def gate_up(self) -> int:
        return -(-2 * self.rank // FILL) * FILL

    @property
    def one(self) -> int:
        return -(-self.rank // FILL) * FILL


@dataclass
class Stack:
    """All layers' weights, with the adapter's copies in them."""

    norm1_LD: torch.Tensor
    qkv_LXD: torch.Tensor  # and R columns: B
    bias_LX: torch.Tensor | None
    a_qkv_LRD: torch.Tensor
    o_LDQ: torch.Tensor  # and R rows: A
    b_o_LDR: torch.Tensor
    norm2_LD: torch.Tensor
    gate_up_LGD: torch.Tensor  # and R columns: B
    a_gate_up_LRD: torch.Tensor
    down_LDF: torch.Tensor  # and R rows: A
    b_down_LDR: torch.Tensor

    @staticmethod
    def empty(shape: Shape, rank: int, dtype: torch.dtype, device: torch.device) -> "Stack":
        """Room for the weights; adapters' places are zeros, and what fills them up stays so."""
        s, ranks, q = shape, Ranks(rank), shape.heads * shape.head

        def make(*size: int) -> torch.Tensor:
            return torch.zeros(s.layers, *size, dtype=dtype, device=device)

        return Stack(
            make(s.hidden),
            make(s.qkv, s.hidden + ranks.qkv),
            make(s.qkv) if s.bias else None,
            make(ranks.qkv, s.hidden),
            make(s.hidden + ranks.one, q),
            make(s.hidden, ranks.one),
            make(s.hidden),
            make(2 * s.inner, s.hidden + ranks.gate_up),
            make(ranks.gate_up, s.hidden),
            make(s.hidden + ranks.one, s.inner),
            make(s.hidden, ranks.one),
        )

    def layers(self, hidden: int) -> list[Layer]:
        """The base's own part of each layer, as everything else in this project lays it out."""
        return [
            Layer(
                self.norm1_LD[i],
                self.qkv_LXD[i][:, :hidden],
                None if self.bias_LX is None else self.bias_LX[i],
                self.o_LDQ[i][:hidden],
                self.norm2_LD[i],
                self.gate_up_LGD[i][:, :hidden],
                self.down_LDF[i][:hidden],
            )
            for i in range(len(self.norm1_LD))
        ]


@dataclass
class Base:
    family: Family
    shape: Shape
    rank: int
    stack: Stack
    embedding: torch.Tensor  # may stay in host memory: only its rows are looked up
    norm: torch.Tensor
    head: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    def weights(self) -> Weights:
        return Weights(self.embedding, self.stack.layers(self.shape.hidden), self.norm, self.head)


def empty_base(
    family: Family, config: Any, rank: int, dtype: torch.dtype, device: torch.device, tokens: int, on_host: bool
) -> Base:
    assert family.shape
    s = family.shape(config)
    table = torch.empty(s.vocabulary, s.hidden, dtype=dtype, device="cpu" if on_host else device)
    head = table if s.tied and not on_host else torch.empty(s.vocabulary, s.hidden, dtype=dtype, device=device)
    cos, sin = rope_table(family, config, dtype, tokens)
    stack, norm = Stack.empty(s, rank, dtype, device), torch.empty(s.hidden, dtype=dtype, device=device)
    return Base(family, s, rank, stack, table, norm, head, (cos.to(device), sin.to(device)))


def load_base(folder: str, dtype: str, rank: int, max_length: int, on_host: bool = False) -> Base:
    """A model's folder, onto the first device."""
    config = load_config(folder)
    family = trained(config)
    base = empty_base(family, config, rank, getattr(torch, dtype), visible_devices()[0], round_up(max_length), on_host)
    if len(base.rope[0]) < max_length:
        raise UserError(
            f"rows of {max_length} tokens, and the model has {len(base.rope[0])} positions; lower max_length"
        )
    loaded = fill(base.weights(), Path(folder), family, base.shape)
    gib = loaded.bytes / 2**30
    print(f"weights: {gib:.2f} GiB in {loaded.seconds:.1f} s, {gib / loaded.seconds:.2f} GiB/s", flush=True)
    return base


def trained(config: Any) -> Family:
    """The family of a model that is trained here."""
    return family_of(config.model_type, "is not one this trainer computes; these are", is_trained)


def is_trained(family: Family) -> bool:
    """Rope, grouped keys, a gated MLP with silu, and nothing else."""
    return family.fused_attention and family.shape is not None
