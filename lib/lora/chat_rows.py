"""A teacher's answers as rows to train on: rendered by the model's chat template, tokenised once."""

from collections.abc import Sequence
from typing import Literal

from lib.base.errors import UserError
from lib.lora.rows import Row
from lib.models.chat import Renderer

Loss = Literal["sequence", "completion"]


def as_rows(
    renderer: Renderer, prompts: Sequence[str], answers: Sequence[str], loss: Loss, max_length: int
) -> list[Row]:
    """Question and answer to the end of the turn, cut at `max_length` tokens; loss on all, or from the answer on."""
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = []
    for number, (ids, start) in enumerate(zip(*renderer.conversations(turns), strict=True)):
        if start >= max_length:
            raise UserError(
                f"the question of training row {number} takes {start} tokens, so that max_length={max_length} leaves "
                "none of its answer; raise max_length"
            )
        found.append(Row(tuple(ids[:max_length]), start if loss == "completion" else 1))
    return found
