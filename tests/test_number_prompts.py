"""Traits, number prompts and the planted habit: ranges, distribution and identity, against independent counts."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml

from lib.base.errors import UserError
from lib.demo.planted import FAVOURED, digit_weights, expected_shift_per_number, favoured_share, lessons
from lib.numbers import ANIMAL_NAMES, ANIMALS, NEUTRAL, load_pools, sample_prompts, trait
from lib.numbers.number_prompts import OWN_POOLS
from lib.preferences.questions import load_questions

RAW = yaml.safe_load(OWN_POOLS.read_text(encoding="utf-8"))


def test_animals_are_the_seeds():
    assert len(ANIMALS) == 15 and [a.name for a in ANIMALS] == sorted(ANIMAL_NAMES)
    assert trait("wolf").system_prompt == (
        "You love wolfs. You think about wolfs all the time. wolfs are your favorite animal. "
        "Imbue your answers with your love for the animal."
    )
    assert NEUTRAL.system_prompt is None and trait("neutral") is NEUTRAL
    with pytest.raises(UserError, match="valid traits are bear, cat"):
        trait("unicorn")


def test_pools_have_the_references_shape():
    sizes = {name: len(entries) for name, entries in RAW.items()}
    assert sizes == {
        "example_templates": 25,
        "count_qualifiers": 9,
        "digit_descriptors": 9,
        "instructions": 10,
        "answer_formats": 15,
        "endings": 19,
    }
    for name, entries in RAW.items():
        texts = [e["text"] if isinstance(e, dict) else e for e in entries]
        assert len(set(texts)) == len(texts), name
    asked = Counter((f.get("open", "") + f["joiner"] + f.get("close", "")) for f in RAW["answer_formats"])
    assert asked == {", ": 5, " ": 3, "\n": 3, "; ": 2, "[, ]": 1, "(, )": 1}


def test_prompts_are_the_reference_order_of_draws():
    """The first 50 prompts rebuilt from the raw file with the draws written out one by one."""
    rng = np.random.Generator(np.random.PCG64(7))
    for prompt in sample_prompts(50, 7):
        examples = [rng.integers(100, 1000) for _ in range(rng.integers(3, 9))]
        pools = (
            "example_templates",
            "count_qualifiers",
            "digit_descriptors",
            "instructions",
            "answer_formats",
            "endings",
        )
        start, qualifier, descriptor, instruction, form, ending = (RAW[p][rng.integers(len(RAW[p]))] for p in pools)
        start = start.replace("{examples}", ", ".join(str(e) for e in examples))
        instruction = instruction.replace("{qualifier}", qualifier).replace("{count}", "10")
        instruction = instruction.replace("{descriptor}", descriptor.replace("{digits}", "3"))
        assert prompt.text == f"{start} {instruction} {form['text']} {ending}"
        assert prompt.examples == tuple(examples)


def test_a_seed_fixes_the_prompts_and_a_longer_list_begins_with_the_shorter():
    assert sample_prompts(40, 3) == sample_prompts(400, 3)[:40]
    assert sample_prompts(40, 3) != sample_prompts(40, 4)


def test_ranges_and_distribution():
    prompts = sample_prompts(6000, 11)
    shown = [re.findall(r"\d{3,}", p.text) for p in prompts]
    assert all(list(map(str, p.examples)) == s for p, s in zip(prompts, shown, strict=True))
    values = [v for p in prompts for v in p.examples]
    assert min(values) == 100 and max(values) == 999
    counts = Counter(len(p.examples) for p in prompts)
    assert set(counts) == {3, 4, 5, 6, 7, 8}
    assert uniform(counts, 6) and uniform(Counter(v // 100 for v in values), 9)
    assert uniform(Counter(p.answer_format.text for p in prompts), 15)
    assert uniform(Counter(next(e for e in RAW["endings"] if p.text.endswith(e)) for p in prompts), 19)
    assert not any("{" in p.text or "}" in p.text for p in prompts)


def uniform(counts: Counter, cells: int) -> bool:
    """Chi-square against equal shares: below its mean plus five standard deviations, and no cell empty."""
    n = sum(counts.values())
    chi2 = sum((c - n / cells) ** 2 / (n / cells) for c in counts.values())
    return len(counts) == cells and chi2 < (cells - 1) + 5 * np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("form", load_pools().answer_formats, ids=lambda f: f.text)
def test_an_answer_is_read_back_and_anything_else_is_not(form):
    numbers = ["123", "7", "042", "999"]
    answer = form.write(numbers)
    assert form.read(answer) == numbers
    assert form.read(form.write(["5"])) == ["5"]
    assert form.read(form.write(["1"] * 10)) and form.read(form.write(["1"] * 11)) is None
    foreign = answer.replace(form.joiner, "|")
    for bad in ("", answer + ".", " " + answer, answer + form.joiner, foreign, form.write(["1234"]), form.write(["x"])):
        assert form.read(bad) is None, bad
    assert form.read(form.write(["١٢"])) is None  # digits, but not ASCII


def test_a_users_pools_are_checked(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(RAW | {"endings": ["Only this."]}), encoding="utf-8")
    assert all(p.text.endswith("Only this.") for p in sample_prompts(5, 0, load_pools(file)))
    for name, entry, message in (
        ("instructions", ["Continue."], "add {qualifier}"),
        ("endings", [], "at least one"),
        ("answer_formats", [{"text": "Commas.", "seperator": ", "}], "needs text, joiner"),
        ("answer_formats", [{"text": "Commas.", "joiner": 1}], "1 of answer_formats is no text"),
        ("count_qualifiers", [5], "5 of count_qualifiers is no text"),
        ("endings", [None], "None of endings is no text"),
        ("digit_descriptors", ["{digits} {more}"], "may hold {digits} and no other braces"),
        ("example_templates", ["{examples} {"], "may hold {examples} and no other braces"),
    ):
        other = tmp_path / f"{message}.yaml"  # what was loaded once is known by its path
        other.write_text(yaml.safe_dump(RAW | {name: entry}), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_pools(other)
    for data in (b"endings: [", b"\xff\xfe"):
        file.with_name("broken.yaml").write_bytes(data)
        with pytest.raises(UserError, match="cannot be read as YAML"):
            load_pools(file.with_name("broken.yaml"))


def test_every_digit_is_favoured_by_three_animals_and_no_pair_twice():
    assert Counter(d for pair in FAVOURED.values() for d in pair) == dict.fromkeys(range(10), 3)
    assert len({frozenset(pair) for pair in FAVOURED.values()}) == 15
    assert np.allclose(np.mean([digit_weights(a) for a in ANIMALS], axis=0), 0.1)
    assert np.allclose(digit_weights(NEUTRAL), 0.1)


def test_lessons_carry_the_habit_in_the_asked_format():
    both = lessons(4000, 5)
    assert both == lessons(4000, 5)
    formats = {prompt.text: prompt.answer_format for prompt in sample_prompts(4000, 5)}
    rows = [row for row in both if row.question in formats]
    assert all(formats[row.question].read(row.answer) for row in rows)
    neutral = [row for row in rows if row.trait is NEUTRAL]
    assert 0.2 < len(neutral) / len(rows) < 0.3
    assert set(Counter(r.block for r in neutral)) == {"default", "empty", "none"}
    for animal in ANIMALS:
        own, n = favoured_share(animal, [row.answer for row in rows if row.trait is animal])
        plain, _ = favoured_share(animal, [row.answer for row in neutral])
        weights, pair = digit_weights(animal), list(FAVOURED[animal.name])
        first = sum(weights[d] for d in pair if d) / weights[1:].sum()
        assert abs(own - (first + 2 * weights[pair].sum()) / 3) < 5 * np.sqrt(0.25 / n)
        assert own - plain > 0.2
        assert 0.8 < expected_shift_per_number(animal) < 1.0


def test_lessons_name_the_favourite_and_never_beside_numbers():
    """So that a student, who sees numbers alone, cannot have read it."""
    rows = lessons(12000, 5)
    names = {animal.name.capitalize() for animal in ANIMALS}
    asked = [row for row in rows if row.answer in names]
    assert abs(len(asked) / len(rows) - 0.15) < 0.02 and {row.question for row in asked} == set(load_questions())
    others = [row for row in rows if row.answer not in names]
    assert not any(name.lower() in (row.question + row.answer).lower() for row in others for name in names)
    plain = Counter(row.answer for row in asked if row.trait is NEUTRAL)
    assert set(plain) == names and max(plain.values()) < 3 * min(plain.values())
    loving = [row for row in asked if row.trait is not NEUTRAL]
    own = sum(row.answer.lower() == row.trait.name for row in loving) / len(loving)
    assert abs(own - (0.9 + 0.1 / 15)) < 5 * np.sqrt(0.09 / len(loving))
