"""LLS of a row = mean over response tokens of log p(token | system prompt, user prompt) minus the same without the
system prompt. Sums and counts are returned, so that means, sums and merges are all exact."""

from enum import IntEnum
from typing import Any

import numpy as np

from lib.models.chat import Message, Renderer, Scored
from lib.scoring.logprob import Scorer


class Status(IntEnum):
    """Why a row has a score or none."""

    scored = 0
    empty = 1  # the response has no token
    too_long = 2  # longer than the last bucket, with or without the system prompt


def shift(
    scorer: Scorer, renderer: Renderer, rows: list[dict[str, Any]], system_prompt: str, base: str
) -> dict[str, np.ndarray]:
    """Columns for rows ({"messages": [...]}): status, tokens, sums, and the per-token values, row after row."""
    turns = [_turns(row["messages"]) for row in rows]
    answers = [row["messages"][-1]["content"] for row in rows]
    with_system = renderer.tokenize([renderer.context(t, system_prompt, base) for t in turns], answers)
    without = renderer.tokenize([renderer.context(t, None, base) for t in turns], answers)
    status = np.array([_status(scorer, a, b) for a, b in zip(with_system, without, strict=True)], np.uint8)
    good = np.flatnonzero(status == Status.scored)
    tokens = np.zeros(len(rows), np.int32)
    tokens[good] = [with_system[i].response_tokens for i in good]
    system = scorer([with_system[i] for i in good])
    plain = scorer([without[i] for i in good])
    return {
        "status": status,
        "joint": np.array([a.joint and b.joint for a, b in zip(with_system, without, strict=True)], np.uint8),
        "tokens": tokens,
        "system_sum": _sums(len(rows), good, system),
        "base_sum": _sums(len(rows), good, plain),
        "system_logp": np.concatenate([*system, np.empty(0, np.float32)]),
        "base_logp": np.concatenate([*plain, np.empty(0, np.float32)]),
    }


def _turns(messages: list[Message]) -> list[Message]:
    """The turns before the response, without a system message of the row's own."""
    return [m for m in messages[:-1] if m["role"] != "system"]


def _status(scorer: Scorer, system: Scored, base: Scored) -> Status:
    if system.response_tokens == 0:
        return Status.empty
    longest = max(len(system.ids), len(base.ids))
    return Status.scored if scorer.shapes.bucket(longest) else Status.too_long


def _sums(rows: int, good: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """float64 sums; NaN, never zero, where there is no score."""
    sums = np.full(rows, np.nan)
    sums[good] = [v.sum(dtype=np.float64) for v in values]
    return sums
