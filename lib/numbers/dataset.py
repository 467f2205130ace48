"""The rows that a student is trained on: so many of a teacher's valid answers, drawn by a seed."""

import random
from collections.abc import Sequence

from lib.base.errors import UserError
from lib.numbers.filter import VALID


def training_rows(
    prompts: Sequence[str], answers: Sequence[str], reasons: Sequence[int], n: int, seed: int
) -> list[int]:
    """Places of the drawn rows in the order of training, by the reference's own draw: random.Random(seed).sample over
    the valid rows in their order."""
    if not len(prompts) == len(answers) == len(reasons):
        raise ValueError(f"{len(prompts)} prompts, {len(answers)} answers and {len(reasons)} reasons are of one cell")
    valid = [place for place, one in enumerate(reasons) if one == VALID]
    if len(valid) < n:
        raise UserError(
            f"{len(valid)} of {len(reasons)} answers are valid, and {n} are wanted for training: lower rows, "
            "or generate more (prompts)"
        )
    return random.Random(seed).sample(valid, n)
