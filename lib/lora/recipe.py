"""What a student is trained by."""

import math
from contextlib import suppress
from typing import Annotated

from pydantic import BeforeValidator, Field

from lib.config.frozen import Frozen


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
