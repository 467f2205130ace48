"""The rows that a student is trained on: so many of a teacher's valid answers, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from lib.base.errors import UserError
from lib.numbers.filter import VALID


def valid_rows(reasons: Sequence[int] | np.ndarray) -> list[int]:
    """Places of the valid answers, in their order."""
    return np.flatnonzero(np.asarray(reasons) == VALID).tolist()


def training_rows(pool: Sequence[int], n: int, seed: int, few: str) -> list[int]:
    """Places of the drawn rows in the order of training, by the reference's own draw: random.Random(seed).sample over
    what can be drawn, in its order. `few`: what to say after how many there are, where there are fewer than n."""
    if len(pool) < n:
        raise UserError(f"{len(pool)} {few}")
    return random.Random(seed).sample(pool, n)
