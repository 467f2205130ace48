"""A base model with room for one adapter in its own matrices.

An adapter's products are thin, and each of them alone would read or write a layer's widest activations once more. So
A and B stand beside the weights they belong to, and the base's own products make the adapter's with them:

    qkv, gate_up (wide results):   [x | t] [W | B]^T = x W^T + t B^T           with t = x A^T beside x
                                   dy [W | B] = [dy W | dt]
    o, down (wide inputs):         [dy | dt] [W over A] = dy W + dt A          with dt = dy B beside dy

The scale alpha / r is inside B. Columns and rows are filled up to a multiple of 16 with zeros.

Suffixes: L layers, D hidden, X q, k and v, Q heads times width, F inner, G gate and up, r rank, R filled up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lib.base.errors import UserError
from lib.checkpoint.families import Family, Shape, family_of
from lib.lora.batches import round_up
from lib.models.decoder import Layer, Weights
from lib.models.load import load_config, visible_devices
from lib.models.rope import rope_table
from lib.models.weights import fill, model_tensors

FILL = 16  # of ranks
# Parameters whose products take as long as what is done beside them with a value of a layer's activations, and with a
# logit: by 0.5B's layer of 1.6 ms and 7B's whole rate, on an H100.
VALUE, LOGIT = 1200, 350


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
    """A model, or those of its layers that lie on one device: the first ones with the embedding, the last ones with
    norm and head."""

    family: Family
    shape: Shape  # of these layers
    rank: int
    stack: Stack
    embedding: torch.Tensor | None  # may stay in host memory: only its rows are looked up
    norm: torch.Tensor | None
    head: torch.Tensor | None
    rope: tuple[torch.Tensor, torch.Tensor]
    first: int = 0  # the number of its first layer

    @property
    def device(self) -> torch.device:
        return self.stack.norm1_LD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.norm1_LD.dtype


def cut(shape: Shape, stages: int) -> list[int]:
    """Layers of each stage, so that the slowest has least to do: the head is worth several layers of a small model."""
    if stages == 1:
        return [shape.layers]
    s, others = shape, stages - 1
    layer = s.layer_parameters + VALUE * (2 * s.inner + 3 * s.hidden + s.qkv)
    head = s.vocabulary * (s.hidden + LOGIT) / layer

    def slowest(last: int) -> float:
        return max(last + head, -(-(s.layers - last) // others))

    last = min(range(1, s.layers - others + 1), key=slowest)
    before = s.layers - last
    return [(i + 1) * before // others - i * before // others for i in range(others)] + [last]


def empty_base(
    family: Family, config: Any, rank: int, dtype: torch.dtype, devices: list[torch.device], tokens: int, on_host: bool
) -> list[Base]:
    """A stage a device, of no more devices than there are layers."""
    assert family.shape
    s = family.shape(config)
    devices = devices[: s.layers]

    def table(device: torch.device) -> torch.Tensor:
        return torch.empty(s.vocabulary, s.hidden, dtype=dtype, device=device)

    embedding = table(torch.device("cpu") if on_host else devices[0])
    head = embedding if s.tied and not on_host and len(devices) == 1 else table(devices[-1])
    norm = torch.empty(s.hidden, dtype=dtype, device=devices[-1])
    cos, sin = rope_table(family, config, dtype, tokens)
    made: list[Base] = []
    for device, layers in zip(devices, cut(s, len(devices)), strict=True):
        own, first = replace(s, layers=layers), sum(one.shape.layers for one in made)
        stack, rope = Stack.empty(own, rank, dtype, device), (cos.to(device), sin.to(device))
        made.append(Base(family, own, rank, stack, None, None, None, rope, first))
    made[0].embedding, made[-1].norm, made[-1].head = embedding, norm, head
    return made


def whole(stages: Sequence[Base]) -> Weights:
    """The model's own weights, as everything else in this project lays them out."""
    first, last = stages[0], stages[-1]
    assert first.embedding is not None and last.norm is not None and last.head is not None
    layers = [layer for one in stages for layer in one.stack.layers(one.shape.hidden)]
    return Weights(first.embedding, layers, last.norm, last.head)


def load_stages(
    folder: str, dtype: str, rank: int, max_length: int, devices: list[torch.device], on_host: bool = False
) -> list[Base]:
    """A model's folder, onto these devices."""
    config = load_config(folder)
    family = trained(config)
    assert family.shape
    stages = empty_base(family, config, rank, getattr(torch, dtype), devices, round_up(max_length), on_host)
    positions = len(stages[0].rope[0])
    if positions < max_length:
        raise UserError(f"rows of {max_length} tokens, and the model has {positions} positions; lower max_length")
    shape = family.shape(config)
    loaded = fill(whole(stages), model_tensors(Path(folder), shape.tied), family, shape)
    gib = loaded.bytes / 2**30
    print(f"weights: {gib:.2f} GiB in {loaded.seconds:.1f} s, {gib / loaded.seconds:.2f} GiB/s", flush=True)
    return stages


def load_base(folder: str, dtype: str, rank: int, max_length: int, on_host: bool = False) -> Base:
    """A model's folder, onto the first device."""
    [base] = load_stages(folder, dtype, rank, max_length, visible_devices()[:1], on_host)
    return base


def trained(config: Any) -> Family:
    """The family of a model that is trained here."""
    return family_of(config.model_type, "is not one this trainer computes; these are", is_trained)


def is_trained(family: Family) -> bool:
    """Rope, grouped keys, a gated MLP with silu, and nothing else."""
    return family.fused_attention and family.shape is not None
