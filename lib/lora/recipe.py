"""What a student is trained by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
