"""How students are trained, and what does it: the fast trainer, or plain peft."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BeforeValidator, Field

from lib.config.frozen import Frozen

if TYPE_CHECKING:
    import torch


def as_number(value: object) -> object:
    """YAML takes 2e-4 for a word, and only 2.0e-4 for a number."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


Real = Annotated[float, BeforeValidator(as_number)]


class Lora(Frozen):
    rank: int = Field(8, ge=1)
    alpha: float = Field(8.0, gt=0)
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) in place of alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="the gradient's norm is brought down to this")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False
    )
    eps: Real = Field(1e-8, gt=0)
    weight_decay: Real = Field(0.0, ge=0)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Row:
    """A whole conversation as token ids, cut at the longest length; `first` is the first token that loss is on."""

    ids: tuple[int, ...]
    first: int

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.ids):
            raise ValueError(f"loss from token {self.first} of {len(self.ids)}: there must be one before it and in it")

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


class Trainer(Protocol):
    """A resident base under one student's adapter. Adapter and moments are float32, whatever the base is."""

    def begin(self, seed: int) -> None:
        """A fresh adapter, by the seed alone."""
        ...

    def step(self, rows: Sequence[Row], learning_rate: float, number: int) -> dict[str, float]:
        """One step of the optimiser, the number-th (from 1), over all rows at once: the loss is the mean over all
        their scored tokens. Returns loss, grad_norm, tokens, scored."""
        ...

    def state(self) -> "dict[str, torch.Tensor]":
        """On the CPU: A and B under peft's names, and Adam's moments, adam.m. and adam.v. before the same names."""
        ...

    def load(self, state: "dict[str, torch.Tensor]") -> None: ...
