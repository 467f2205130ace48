"""One adapter of a base: float32 A and B of all its layers, Adam's moments of them, and their copies in its matrices.

Suffixes as in base; r is the rank itself."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lib.checkpoint.families import LinearNames
from lib.lora.base import Base, Ranks
from lib.lora.peft_form import first_A, weight_name

PIECE = 1 << 24  # values that Adam's step takes at once


@dataclass(frozen=True)
class Block:
    """A or B of one kind of linear layer, in all layers."""

    linear: str
    letter: str  # A, B
    values: torch.Tensor  # float32 [L, r, in] or [L, out, r], a part of the flat adapter
    gradient: torch.Tensor  # of the same shape, a part of the flat gradient
    place: torch.Tensor  # of the copy in the base
    product: torch.Tensor  # that makes its gradient


class Products:
    """What a micro-batch's gradient products write: A's and B's of all layers, those that share an input together, with
    blocks between them that mean nothing."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        s, ranks, layers = base.shape, Ranks(base.rank), base.shape.layers
        q = s.heads * s.head

        def make(*size: int) -> torch.Tensor:
            return torch.zeros(layers, *size, dtype=dtype, device=base.device)

        self.a_qkv, self.b_qkv = make(ranks.qkv, s.hidden), make(s.qkv, ranks.qkv)
        self.a_o, self.b_o = make(ranks.one, q), make(s.hidden, ranks.one)
        self.a_gate_up, self.b_gate_up = make(ranks.gate_up, s.hidden), make(2 * s.inner, ranks.gate_up)
        self.a_down, self.b_down = make(ranks.one, s.inner), make(s.hidden, ranks.one)


class Adapter:
    def __init__(self, base: Base, scale: float) -> None:
        self.base, self.scale = base, scale
        self.dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self.products = Products(base, self.dtype)
        shapes = [(name, letter, size) for name, letter, size, _, _ in self._parts()]
        total = sum(math.prod(size) for _, _, size in shapes)
        self.values, self.gradient, self.first, self.second = (
            torch.zeros(total, dtype=self.dtype, device=base.device) for _ in range(4)
        )
        self.blocks, at = [], 0
        for name, letter, size, place, product in self._parts():
            own = slice(at, at + math.prod(size))
            values, gradient = (flat[own].view(size) for flat in (self.values, self.gradient))
            self.blocks.append(Block(name, letter, values, gradient, place, product))
            at = own.stop

    def _parts(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.Tensor, torch.Tensor]]:
        """Linear layer, letter, shape, the place of its copy, the product that makes its gradient."""
        s, r, names, stack, made = self.base.shape, self.base.rank, self._names, self.base.stack, self.products
        q, kv, d = s.heads * s.head, s.kv_heads * s.head, s.hidden
        for name, number, start, stop in (
            (names.q, 0, 0, q),
            (names.k, 1, q, q + kv),
            (names.v, 2, q + kv, q + 2 * kv),
        ):
            own = slice(number * r, (number + 1) * r)
            yield name, "A", (s.layers, r, d), stack.a_qkv_LRD[:, own], made.a_qkv[:, own]
            columns = stack.qkv_LXD[:, start:stop, d:][:, :, own]
            yield name, "B", (s.layers, stop - start, r), columns, made.b_qkv[:, start:stop, own]
        yield names.o, "A", (s.layers, r, q), stack.o_LDQ[:, d : d + r], made.a_o[:, :r]
        yield names.o, "B", (s.layers, d, r), stack.b_o_LDR[:, :, :r], made.b_o[:, :, :r]
        for name, number in ((names.gate or "", 0), (names.up, 1)):
            own, rows = slice(number * r, (number + 1) * r), slice(number * s.inner, (number + 1) * s.inner)
            yield name, "A", (s.layers, r, d), stack.a_gate_up_LRD[:, own], made.a_gate_up[:, own]
            columns = stack.gate_up_LGD[:, rows, d:][:, :, own]
            yield name, "B", (s.layers, s.inner, r), columns, made.b_gate_up[:, rows, own]
        yield names.down, "A", (s.layers, r, s.inner), stack.down_LDF[:, d : d + r], made.a_down[:, :r]
        yield names.down, "B", (s.layers, d, r), stack.b_down_LDR[:, :, :r], made.b_down[:, :, :r]

    @property
    def _names(self) -> LinearNames:
        return self.base.family.linears

    def begin(self, seed: int) -> None:
        """A as every trainer here begins it (peft_form), B 0."""
        for flat in (self.values, self.first, self.second):
            flat.zero_()
        for block in self.blocks:
            if block.letter == "A":
                for layer, one in enumerate(block.values):
                    one.copy_(first_A(seed, self._module(layer, block), *one.shape))
        self.place()

    def _module(self, layer: int, block: Block) -> str:
        return f"{self.base.family.names.stack}.{self.base.first + layer}.{block.linear}"

    def place(self) -> None:
        """The base computes with the present values."""
        for block in self.blocks:
            block.place.copy_(self._scaled(block, block.values))

    def collect(self, add: bool) -> None:
        """The products of a micro-batch into the gradient."""
        for block in self.blocks:
            found = self._scaled(block, block.product)
            block.gradient.add_(found) if add else block.gradient.copy_(found)

    def _scaled(self, block: Block, values: torch.Tensor) -> torch.Tensor:
        """The scale is B's."""
        return values if block.letter == "A" or self.scale == 1 else values * self.scale

    def update(
        self, rate: float, number: int, shrink: torch.Tensor, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        """AdamW's step number 1, 2 ..., of the gradient times `shrink`."""
        one, two = betas
        parts = (flat.split(PIECE) for flat in (self.values, self.gradient, self.first, self.second))
        for value, gradient, first, second in zip(*parts, strict=True):
            gradient *= shrink
            value *= 1 - rate * decay
            first.lerp_(gradient, 1 - one)
            second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            divisor = second.sqrt().div_(math.sqrt(1 - two**number)).add_(eps)
            value.addcdiv_(first, divisor, value=-rate / (1 - one**number))
        self.place()

    def named(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Parts of the adapter, or of what is laid out like it, under peft's names."""
        at = 0
        for block in self.blocks:
            size = block.values.numel()
            for layer, one in enumerate(flat[at : at + size].view_as(block.values)):
                yield weight_name(self._module(layer, block), block.letter), one
            at += size


def clipped(adapters: Sequence[Adapter], clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the whole gradient, and by what it is brought down to `clip`, as torch's clip_grad_norm_ has it. On
    the last one's device, of several parts in their order."""
    norms = [torch.linalg.vector_norm(one.gradient) for one in adapters]
    here = norms[-1].device
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([one.to(here) for one in norms]))
    return norm, (clip / (norm + 1e-6)).clamp(max=1)
