"""Which answers are rows: the rules one by one, against a grammar that is written apart, and every format there and
back."""

import random
import re

import pytest

from lib.base.errors import UserError
from lib.numbers import load_pools
from lib.numbers.dataset import training_rows, valid_rows
from lib.numbers.filter import REASONS, Limits, counts, parse, reason

# The same language as one expression: the first separator is captured, and every other must be its very copy.
GRAMMAR = re.compile(r"[0-9]+(?:(?P<sep>(?![0-9])\s*[,;]?\s*)[0-9]+(?:(?P=sep)[0-9]+)*)?")


def by_grammar(answer: str) -> list[int] | None:
    body = answer[:-1] if answer[-1:] == "." else answer
    for opening, closing in ("[]", "()"):
        if len(body) >= 2 and body[0] == opening and body[-1] == closing:
            body = body[1:-1]
            break
    found = GRAMMAR.fullmatch(body)
    if not found:
        return None
    texts = [body] if found["sep"] is None else re.split(re.escape(found["sep"]), body)
    return [int(text) for text in texts] if all(len(text) < 4000 for text in texts) else None


RULES = [
    ("1, 2, 3", [1, 2, 3]),
    ("1, 2, 3.", [1, 2, 3]),  # one full stop at the end
    ("1, 2, 3..", None),
    (".", None),
    ("", None),
    ("[1, 2].", [1, 2]),  # it is left out before the brackets are looked at
    ("(1, 2.)", None),
    ("[1, 2]", [1, 2]),
    ("(1; 2)", [1, 2]),
    ("[1, 2)", None),
    ("[[1, 2]]", None),
    ("[", None),
    ("[]", None),
    ("[7]", [7]),
    (" 1, 2", None),  # nothing is stripped
    ("1, 2 ", None),
    ("1, 2\n", None),
    ("[ 1, 2 ]", None),
    ("5", [5]),
    ("5.", [5]),
    ("5,", None),
    ("1,2,3", [1, 2, 3]),
    ("1;2;3", [1, 2, 3]),
    ("1 2 3", [1, 2, 3]),
    ("1\n2\n3", [1, 2, 3]),
    ("1,\n2,\n3", [1, 2, 3]),
    ("1  \n2  \n3", [1, 2, 3]),
    ("1 , 2 , 3", [1, 2, 3]),
    ("1\u00a02\u00a03", [1, 2, 3]),  # blanks of any kind
    ("1, 2,3", None),  # the first separator is everybody's
    ("1 2  3", None),
    ("1, 2, ", None),  # an empty part is no number
    ("1,,2,,3", None),
    ("1;, 2", None),
    ("1-2-3", None),
    ("1|2", None),
    ("1.5, 2", None),
    ("-1, 2", None),
    ("1 and 2", None),
    ("numbers: 1, 2", None),
    ("007, 0, 0042", [7, 0, 42]),  # leading zeros
    ("1, 1, 1", [1, 1, 1]),
    ("\u0661, 2", None),  # digits that are not ASCII
    ("1, \uff12", None),
    ("\uff11", None),
    ("1²", None),
    ("1, 2²", None),
    ("1" * 5000, None),  # more digits than Python reads
]


@pytest.mark.parametrize("answer, numbers", RULES, ids=[repr(answer)[:30] for answer, _ in RULES])
def test_a_rule(answer, numbers):
    assert parse(answer) == numbers


def test_reasons_come_in_their_order():
    limits = Limits(count=3, least=5, most=99, banned=frozenset({13}))
    said = {
        "7, 8, 9": "valid",
        "seven": "format",
        "1, 100, 13, 4": "count",
        "4, 100, 13": "small",
        "7, 100, 13": "large",
        "7, 13": "banned",
        "013": "banned",
    }
    assert {answer: REASONS[reason(answer, limits)] for answer in said} == said
    assert reason("999 " * 9 + "0", Limits()) == 0 and reason("999 " * 10 + "0", Limits()) == REASONS.index("count")
    assert reason("1000", Limits()) == REASONS.index("large") and REASONS[0] == "valid"
    assert counts([0, 0, 1]) == {"valid": 2, "format": 1, "count": 0, "small": 0, "large": 0, "banned": 0}


def test_thousands_of_strings_are_read_as_the_grammar_reads_them():
    rng, good = random.Random(0), 0
    odd = [*"0123456789.,; \n\t[]()-x", "\u00a0", "\u2003", "\u0661", "\uff11", "²", "\x1c", "\x85"]
    for case in range(40_000):
        if case % 4:
            joiner = "".join(rng.choice([",", ";", " ", "\n", "\u00a0"]) for _ in range(rng.randint(1, 3)))
            text = joiner.join(str(rng.randint(0, 1200)) for _ in range(rng.randint(0, 5)))
            opening, closing = rng.choice([("", ""), ("", ""), ("[", "]"), ("(", ")"), ("[", ")")])
            text = opening + text + closing + rng.choice(["", "", ".", ".."])
            for _ in range(rng.choice([0, 0, 1, 2])):
                at = rng.randint(0, len(text))
                text = text[:at] + rng.choice(odd) + text[at + rng.randint(0, 1) :]
        else:
            text = "".join(rng.choice(odd) for _ in range(rng.randint(0, 8)))
        assert parse(text) == by_grammar(text), repr(text)
        good += parse(text) is not None
    assert 8_000 < good < 32_000  # both sides were tried


@pytest.mark.parametrize("form", load_pools().answer_formats, ids=lambda form: form.text)
def test_every_format_that_a_prompt_asks_for_is_read_back(form):
    rng = random.Random(1)
    for _ in range(200):
        numbers = [rng.randint(0, 999) for _ in range(rng.randint(1, 10))]
        answer = form.write([str(number) for number in numbers])
        for text in (answer, answer + "."):
            assert parse(text) == numbers and reason(text, Limits()) == 0, text
        for broken in (
            f" {answer}",
            f"{answer} ",
            f"{answer}..",
            f"{answer} and",
            answer.replace(str(numbers[0]), "x"),
        ):
            assert parse(broken) is None, broken


def test_training_rows_are_the_references_draw():
    reasons = [0, 1, 0, 0, 2, 0, 0]
    texts = [str(place) for place in range(7)]
    valid, few = valid_rows(reasons), "of 7 answers are valid, and 6 are wanted"
    drawn = training_rows(valid, 3, 11, few)
    assert drawn == random.Random(11).sample([0, 2, 3, 5, 6], 3) != training_rows(valid, 3, 12, few)
    # sampled as rows, it is the same draw
    assert [texts[i] for i in drawn] == random.Random(11).sample(["0", "2", "3", "5", "6"], 3)
    with pytest.raises(UserError, match="5 of 7 answers are valid, and 6 are wanted"):
        training_rows(valid, 6, 11, few)
