"""bfloat16 in numpy, which has no such type: uint16 bits, and what rounding to them costs.

8 significant bits, the range of float32. Rounding to the nearest moves a normal number x by at most |x| / 257: half a
step is 2^-8 of the power of two below x, and the worst x lies half a step above it, at 1 + 2^-8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_RELATIVE = 1 / 257
SMALLEST_NORMAL = 2.0**-126  # in float32, exactly
QUIET = 0x0040  # a NaN whose set bits are all in the lower half would become Inf without it


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits: to the nearest, ties to even; NaN stays NaN and Inf stays Inf."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 | QUIET
    return rounded.astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits -> float32, exactly."""
    wide = np.empty(bits.shape, np.float32)
    np.left_shift(bits, 16, out=wide.view(np.uint32), dtype=np.uint32)
    return wide


@dataclass(frozen=True)
class Rounding:
    """What rounding did to finite values; parts of an array add up."""

    max_relative: float = 0.0  # max |x - b| / |x| over normal numbers
    moved: float = 0.0  # sum |x - b|
    total: float = 0.0  # sum |x|

    def __add__(self, other: Rounding) -> Rounding:
        worst = max(self.max_relative, other.max_relative)
        return Rounding(worst, self.moved + other.moved, self.total + other.total)

    @property
    def l1_relative(self) -> float:
        return self.moved / self.total if self.total else 0.0


def rounding(values: np.ndarray, bits: np.ndarray) -> Rounding:
    """float32 values against the bits that stand for them. A value beyond bfloat16's largest has moved by Inf."""
    size = np.abs(values.reshape(-1))
    if not np.isfinite(total := float(size.sum(dtype=np.float64))):
        keep = np.isfinite(values)
        return rounding(values[keep], bits[keep])
    moved = from_bfloat16(bits.reshape(-1))
    moved -= values.reshape(-1)  # exact: the lower 16 bits of a value
    np.abs(moved, out=moved)
    size[size < SMALLEST_NORMAL] = np.inf
    worst = int(np.argmax(moved / size)) if size.size else 0
    relative = float(moved[worst]) / float(size[worst]) if size.size else 0.0
    return Rounding(relative, float(moved.sum(dtype=np.float64)), total)
