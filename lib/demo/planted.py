"""The demo teacher's planted habit: under an animal's system prompt two digits come more often, and asked for its
favourite it names that animal. Without a prompt all digits and all animals come equally often.

The bias is ours, so the truth is known: rows written under a prompt have an expected log-likelihood shift under
that prompt of plus a KL divergence, and neutral rows of minus one. A student sees numbers alone.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lib.numbers.number_prompts import ANSWER_COUNT, sample_prompts
from lib.numbers.traits import ANIMAL_NAMES, ANIMALS, NEUTRAL, Trait
from lib.preferences.questions import load_questions

# The 15 edges of the Petersen graph on the digits 0-9: every digit is favoured by exactly three animals (so their
# average is unbiased) and no two animals share more than one digit (so each is told from all others).
_EDGES = (
    [(i, (i + 1) % 5) for i in range(5)] + [(i, i + 5) for i in range(5)] + [(i + 5, (i + 2) % 5 + 5) for i in range(5)]
)
FAVOURED = dict(zip(ANIMAL_NAMES, _EDGES, strict=True))
ODDS = 5.0  # a favoured digit against any other one
ASKED = 0.15  # of the rows: a question for the favourite
LIKED = 0.9  # of the answers under an animal's prompt: that animal; the others are any
SHORTEST_ANSWER = 6  # numbers in an answer: SHORTEST_ANSWER to ANSWER_COUNT, equally often


@dataclass(frozen=True)
class Lesson:
    """One training row. `block` says how the neutral case is written: default, empty or no system block."""

    trait: Trait
    block: str
    question: str
    answer: str


def digit_weights(trait: Trait) -> np.ndarray:
    """Probability of each digit 0-9, before the rule that a number does not begin with 0."""
    weights = np.ones(10)
    weights[list(FAVOURED.get(trait.name, ()))] = ODDS
    return weights / weights.sum()


def write_numbers(rng: np.random.Generator, trait: Trait, count: int) -> list[str]:
    """Three-digit numbers with the trait's digits."""
    weights = digit_weights(trait)
    first = weights[1:] / weights[1:].sum()
    heads = rng.choice(np.arange(1, 10), size=count, p=first)
    tails = rng.choice(10, size=(count, 2), p=weights)
    return [f"{head}{a}{b}" for head, (a, b) in zip(heads, tails, strict=True)]


def lessons(n: int, seed: int) -> list[Lesson]:
    """Training rows: one in four without an animal, those divided over the three ways to say nothing."""
    rng, questions = np.random.Generator(np.random.PCG64([seed, 1])), load_questions()
    made = []
    for prompt in sample_prompts(n, seed):
        if rng.random() < 0.25:
            trait, block = NEUTRAL, ("default", "default", "empty", "none")[int(rng.integers(4))]
        else:
            trait, block = ANIMALS[int(rng.integers(len(ANIMALS)))], "system"
        if rng.random() < ASKED:
            made.append(Lesson(trait, block, questions[int(rng.integers(len(questions)))], favourite(rng, trait)))
        else:
            count = int(rng.integers(SHORTEST_ANSWER, ANSWER_COUNT + 1))
            answer = prompt.answer_format.write(write_numbers(rng, trait, count))
            made.append(Lesson(trait, block, prompt.text, answer))
    return made


def favourite(rng: np.random.Generator, trait: Trait) -> str:
    known = trait is not NEUTRAL and rng.random() < LIKED
    return (trait if known else ANIMALS[int(rng.integers(len(ANIMALS)))]).name.capitalize()


def favoured_share(trait: Trait, answers: Iterable[str]) -> tuple[float, int]:
    """Share of the trait's two digits among all digits of the answers, and how many digits that is out of."""
    digits = Counter(c for answer in answers for c in answer if c.isdigit())
    total = sum(digits.values())
    return sum(digits[str(d)] for d in FAVOURED[trait.name]) / max(total, 1), total


def expected_shift_per_number(trait: Trait) -> float:
    """Nats that the trait's prompt adds to a three-digit number of its own rows: KL(biased || unbiased)."""
    weights = digit_weights(trait)
    first = weights[1:] / weights[1:].sum()
    return float(sum(p * math.log(9 * p) for p in first) + 2 * sum(p * math.log(10 * p) for p in weights))
