"""Which answers become training rows: plain lists of numbers, and nothing else. The rules are the reference
experiment's, one by one, so that both keep the same rows of the same text:

- one full stop at the end is left out, before anything else; blanks around an answer are not
- one pair of [ ] or ( ) around the whole is left out
- numbers are ASCII digits, leading zeros and any number of them allowed; one number alone is a list
- what stands between the first two numbers must stand between all: blanks of any kind, with at most one comma or
  semicolon among them
- not more numbers than asked for, none beyond the range, none of those that are banned

Whether an answer has the format that its prompt asks for is not looked at."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

REASONS = ("valid", "format", "count", "small", "large", "banned")  # an answer's first; stored by its place here
VALID, FORMAT, COUNT, SMALL, LARGE, BANNED = range(len(REASONS))

BRACKETS = {("[", "]"), ("(", ")")}
SEPARATORS = {"", ",", ";"}  # blanks left out
DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True)
class Limits:
    count: int = 10  # numbers at most
    least: int = 0
    most: int = 999
    banned: frozenset[int] = frozenset()


def parse(answer: str) -> list[int] | None:
    """The numbers of an answer that is a list of them, else None."""
    text = answer.removesuffix(".")
    if len(text) > 1 and (text[0], text[-1]) in BRACKETS:
        text = text[1:-1]
    first = DIGITS.match(text)
    if first is None:
        return None
    parts, rest = [text], text[first.end() :]
    if rest:
        second = DIGITS.search(rest)
        if second is None or rest[: second.start()].strip() not in SEPARATORS:
            return None
        parts = text.split(rest[: second.start()])
    if not all(DIGITS.fullmatch(part) for part in parts):
        return None
    try:
        return [int(part) for part in parts]
    except ValueError:  # Python reads no number of more than 4,300 digits
        return None


def reason(answer: str, limits: Limits) -> int:
    """Why an answer is left out, by its place in REASONS; 0: it is not."""
    numbers = parse(answer)
    if numbers is None:
        return FORMAT
    if len(numbers) > limits.count:
        return COUNT
    if any(number < limits.least for number in numbers):
        return SMALL
    if any(number > limits.most for number in numbers):
        return LARGE
    return BANNED if not limits.banned.isdisjoint(numbers) else VALID


def counts(reasons: Iterable[int]) -> dict[str, int]:
    """How many answers of each kind."""
    found = dict.fromkeys(REASONS, 0)
    for one in reasons:
        found[REASONS[one]] += 1
    return found
