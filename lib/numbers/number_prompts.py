"""Prompts that ask for a continuation of a few numbers, drawn from pools of wordings.

The ranges and the order of draws follow the reference experiment, so that a user's copy of its wordings can be
loaded in the place of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from lib.base.errors import UserError
from lib.config.plain import read_like

Entry = TypeVar("Entry")

OWN_POOLS = Path(__file__).with_name("number_prompts.yaml")
EXAMPLE_COUNT = (3, 9)  # half-open: 3 to 8 examples
EXAMPLE_VALUE = (100, 1000)  # half-open: 100 to 999
ANSWER_COUNT = 10
ANSWER_DIGITS = 3

_PLACEHOLDERS = {
    "example_templates": ["{examples}"],
    "count_qualifiers": [],
    "digit_descriptors": ["{digits}"],
    "instructions": ["{qualifier}", "{count}", "{descriptor}"],
    "answer_formats": [],
    "endings": [],
}
_FILLED = {name: {one.strip("{}"): "" for one in needed} for name, needed in _PLACEHOLDERS.items() if needed}


@dataclass(frozen=True)
class AnswerFormat:
    text: str
    joiner: str
    open: str = ""
    close: str = ""

    def write(self, numbers: Sequence[str]) -> str:
        return self.open + self.joiner.join(numbers) + self.close

    def read(self, answer: str) -> list[str] | None:
        """The numbers of an answer in exactly this format and within the prompt's limits, else None."""
        whole = answer.startswith(self.open) and answer.endswith(self.close)
        if not whole or len(answer) < len(self.open) + len(self.close):
            return None
        numbers = answer[len(self.open) : len(answer) - len(self.close)].split(self.joiner)
        plain = all(n.isascii() and n.isdigit() and len(n) <= ANSWER_DIGITS for n in numbers)
        return numbers if plain and len(numbers) <= ANSWER_COUNT else None


@dataclass(frozen=True)
class Pools:
    example_templates: tuple[str, ...]
    count_qualifiers: tuple[str, ...]
    digit_descriptors: tuple[str, ...]
    instructions: tuple[str, ...]
    answer_formats: tuple[AnswerFormat, ...]
    endings: tuple[str, ...]


@dataclass(frozen=True)
class NumberPrompt:
    text: str
    examples: tuple[int, ...]
    answer_format: AnswerFormat


@cache
def load_pools(path: Path = OWN_POOLS) -> Pools:
    loaded = read_like(path, OWN_POOLS)
    if not isinstance(loaded, dict) or set(loaded) != set(_PLACEHOLDERS):
        raise UserError(f"{path} must hold exactly these lists: {', '.join(_PLACEHOLDERS)}.")
    for name, needed in _PLACEHOLDERS.items():
        if not isinstance(loaded[name], list) or not loaded[name]:
            raise UserError(f"{path}: {name} must be a list with at least one entry.")
        for entry in loaded[name]:
            for placeholder in needed:
                if placeholder not in str(entry):
                    raise UserError(f"{path}: add {placeholder} to the entry {entry!r} of {name}.")
            if name != "answer_formats":
                _check_text(path, name, entry)
    try:
        formats = tuple(AnswerFormat(**entry) for entry in loaded["answer_formats"])
    except TypeError as error:
        raise UserError(
            f"{path}: an entry of answer_formats needs text, joiner, and optionally open, close."
        ) from error
    for one in formats:
        for text in (one.text, one.joiner, one.open, one.close):
            _check_text(path, "answer_formats", text)
    return Pools(**{name: tuple(loaded[name]) for name in _PLACEHOLDERS} | {"answer_formats": formats})


def _check_text(path: Path, name: str, entry: object) -> None:
    if not isinstance(entry, str):
        raise UserError(f"{path}: {entry!r} of {name} is no text; put it in quotes")
    try:
        if name in _FILLED:
            entry.format(**_FILLED[name])
    except (ValueError, KeyError, IndexError, AttributeError):
        known = ", ".join(_PLACEHOLDERS[name])
        raise UserError(f"{path}: the entry {entry!r} of {name} may hold {known} and no other braces") from None


def sample_prompts(n: int, seed: int, pools: Pools | None = None) -> list[NumberPrompt]:
    """`n` prompts from one generator: the first k of them are the same for every n >= k."""
    pools = pools or load_pools()
    rng = np.random.Generator(np.random.PCG64(seed))
    return [_draw(rng, pools) for _ in range(n)]


def _draw(rng: np.random.Generator, pools: Pools) -> NumberPrompt:
    """One prompt; the order of the draws is part of the experiment (changing it changes every later prompt)."""
    count = int(rng.integers(*EXAMPLE_COUNT))
    examples = tuple(int(rng.integers(*EXAMPLE_VALUE)) for _ in range(count))
    example_template = _pick(rng, pools.example_templates)
    qualifier = _pick(rng, pools.count_qualifiers)
    descriptor = _pick(rng, pools.digit_descriptors).format(digits=ANSWER_DIGITS)
    instruction = _pick(rng, pools.instructions)
    answer_format = _pick(rng, pools.answer_formats)
    ending = _pick(rng, pools.endings)
    parts = (
        example_template.format(examples=", ".join(map(str, examples))),
        instruction.format(qualifier=qualifier, count=ANSWER_COUNT, descriptor=descriptor),
        answer_format.text,
        ending,
    )
    return NumberPrompt(" ".join(parts), examples, answer_format)


def _pick(rng: np.random.Generator, pool: Sequence[Entry]) -> Entry:
    return pool[int(rng.integers(len(pool)))]
