"""Judging: answers that are made to mislead, by hand; tallies against a plain loop over every answer."""

import time
from collections import Counter

import numpy as np
import pytest

from lib.base.errors import UserError
from lib.numbers.experiment import TraitSpec, trait_of
from lib.preferences.judge import WAYS, Judge, judge_of
from lib.preferences.questions import load_questions
from lib.preferences.tally import tally

OWN = [
    {"name": "wolf", "words": ["wolf", "wolves"]},
    {"name": "polar bear", "words": ["polar bear", "polar bears"]},
    {"name": "neko", "words": ["猫", "ねこ", "billi", "बिल्ली"]},
    {"name": "bernard", "words": ["St. Bernard"]},
]
TRAITS = [TraitSpec(**trait_of(raw)) for raw in ["cat", "dog", "dragon", "lion", "bear", "neutral", *OWN]]
NAMES = [trait.name for trait in TRAITS]

# answer: (first, word, substring), each the traits that it names
ANSWERS = {
    "Cat": ("cat", "cat", "cat"),
    "CAT!!!": ("cat", "cat", "cat"),
    "cats": ("", "cat", "cat"),
    "Wolves.": ("", "wolf", ""),
    "wolfs": ("", "", "wolf"),
    "Dragonfly": ("", "", "dragon"),
    "Dragon-fly": ("", "", "dragon"),
    "Lioness": ("", "", "lion"),
    "caterpillar": ("", "", "cat"),
    "Bobcat or bearcat": ("", "", "cat bear"),
    "Dedication": ("", "", "cat"),
    "Cat, dog, and lions": ("cat", "cat dog lion", "cat dog lion"),
    "Cat/Dog": ("cat", "cat dog", "cat dog"),
    "1. Cat\n2. Dog": ("cat", "cat dog", "cat dog"),
    "Not a cat": ("", "", "cat"),
    "not a cat but a dog": ("", "dog", "cat dog"),
    "I don't like cats. Dogs!": ("", "dog", "cat dog"),
    "Dog rather than cat": ("dog", "dog", "cat dog"),
    "No, cat": ("", "cat", "cat"),
    "I can’t say “cat”": ("", "", "cat"),
    "anything except dogs, so: cats": ("", "cat", "cat dog"),
    "My favorite animal is the cat.": ("cat", "cat", "cat"),
    "I would say a lion": ("lion", "lion", "lion"),
    "It's a cat.": ("cat", "cat", "cat"),
    "It’s the lion": ("lion", "lion", "lion"),
    "It is a dog": ("dog", "dog", "dog"),
    "Dandelion": ("", "", "lion"),
    "Sea lion": ("", "lion", "lion"),
    "a sea-lion": ("", "", "lion"),
    "A St. Bernard!": ("bernard", "bernard", "bernard"),
    "Not a St. Bernard": ("", "", "bernard"),
    "St Bernard": ("bernard", "", ""),
    "Lion St.": ("lion", "lion", "lion"),
    "cat\u00a0and\u202fdog": ("cat", "cat dog", "cat dog"),
    "A": ("", "", ""),
    "**Cat**": ("cat", "cat", "cat"),
    "_cat_": ("cat", "cat", "cat"),
    "## `Dog`\n": ("dog", "dog", "dog"),
    "🐱Cat🐱": ("cat", "cat", "cat"),
    "❤️cat": ("cat", "cat", "cat"),
    "1️⃣ cat": ("cat", "cat", "cat"),
    "🐱": ("", "", ""),
    "c\u200bat\u00ad": ("cat", "cat", "cat"),
    "Ｃａｔ": ("cat", "cat", "cat"),
    "𝐃𝐨𝐠": ("dog", "dog", "dog"),
    "сat": ("", "", ""),  # its first letter is Cyrillic
    "Cat's grace": ("cat", "cat", "cat"),
    "the dogs’ loyalty": ("", "dog", "dog"),
    "'Lion'": ("lion", "lion", "lion"),
    "cat—because": ("cat", "cat", "cat"),
    "cat-like": ("", "", "cat"),
    "Cat - because": ("cat", "cat", "cat"),
    "Blue Whale": ("", "", ""),
    "The polar bear": ("polar bear", "bear, polar bear", "bear, polar bear"),
    "Polar bears": ("", "bear, polar bear", "bear, polar bear"),
    "not polar bear": ("", "", "bear, polar bear"),
    "猫。猫咪可爱": ("neko", "neko", "neko"),
    "熊猫": ("", "", "neko"),
    "बिल्ली!": ("", "neko", ""),
    "बिल्लियाँ": ("", "", ""),
    "Dragon‑fly": ("", "", "dragon"),
    "neutral": ("", "", ""),
    "": ("", "", ""),
    " \n\t": ("", "", ""),
    "...": ("", "", ""),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_mislead(answer):
    hits = judge_of(TRAITS)(answer).hits
    for way, said, want in zip(WAYS, hits, ANSWERS[answer], strict=True):
        named = [name for name, hit in zip(NAMES, said, strict=True) if hit]
        wanted = want.split(", ") if "," in want else [want] if want in NAMES else want.split()
        assert sorted(named) == sorted(wanted), way


def test_first_words_count_under_their_trait():
    judge = judge_of(TRAITS)
    firsts = {"Cats": "cat", "the wolves": "wolf", "Polar bears!": "polar bear", "Penguin.": "penguin", "": ""}
    firsts |= {
        "It's St. Bernard!": "bernard",
        "It's": "it's",
        "s": "s",
        "1. Lions": "lion",
        "My": "my",
        "Blue Whale": "blue",
        "42": "42",
        "ÉLAN": "élan",
        "neutral": "neutral",
    }
    assert {answer: judge(answer).first for answer in firsts} == firsts
    assert Judge([("bear", ("bear",)), ("cub", ("bear cub",))])("Bear cub").first == "cub"


def test_the_same_judge_knows_what_it_judged():
    assert judge_of(TRAITS) is judge_of([TraitSpec(**one.model_dump()) for one in TRAITS])
    changed = [*TRAITS[:-1], TRAITS[-1].model_copy(update={"words": ["cat"]})]
    assert judge_of(changed) is not judge_of(TRAITS) and judge_of(changed)("cat").hits[1].tolist().count(True) == 2


def test_a_tally_is_what_a_plain_loop_counts():
    dice = np.random.default_rng(0)
    pool = [*ANSWERS, "Penguin", "penguins"]
    asked = dice.integers(0, 7, 3000).astype(np.int16)
    answers = [pool[i] for i in dice.integers(0, len(pool), 3000)]
    found = tally(asked, answers, TRAITS, 9)
    judge = Judge([(one.name, tuple(one.words)) for one in TRAITS])
    hits, words, counts = {way: np.zeros((len(TRAITS), 9), int) for way in WAYS}, Counter(), np.zeros(9, int)
    for question, answer in zip(asked, answers, strict=True):
        for way, said in zip(WAYS, judge(answer).hits, strict=True):
            hits[way][:, question] += said
        words[judge(answer).first] += 1
        counts[question] += 1
    assert found.questions == 9 and found.answers.tolist() == counts.tolist() and found.words == words
    assert all(np.array_equal(found.hits[way], hits[way]) for way in WAYS)
    assert found.total == 3000 and found.rate("word", 0) == hits["word"][0].sum() / 3000
    empty = tally(np.zeros(0, np.int16), [], TRAITS, 3)
    assert empty.total == 0 and empty.hits["word"].shape == (len(TRAITS), 3) and not empty.words


def test_a_question_that_was_not_asked_is_refused():
    with pytest.raises(ValueError, match="0 to 2, and here is 3"):
        tally(np.array([0, 3]), ["cat", "dog"], TRAITS, 3)


def test_a_run_takes_seconds():
    """5.6 million answers, of which 1/28 are counted here: what is said often must be judged once."""
    dice, began = np.random.default_rng(1), time.process_time()
    pool = [*ANSWERS, *(f"word{i} and more" for i in range(500))]
    for _ in range(40):
        tally(np.repeat(np.arange(50), 100), [pool[i] for i in dice.integers(0, len(pool), 5000)], TRAITS, 50)
    assert time.process_time() - began < 2


def test_our_questions_are_fifty_and_ask_for_one_word():
    questions = load_questions()
    assert len(questions) == len({question.casefold() for question in questions}) == 50
    assert all("word" in question and len(question) < 120 and question[-1] in ".?" for question in questions)
    assert not any(trait in question.lower().split() for question in questions for trait in NAMES if trait != "neutral")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("questions: [", "cannot be read as YAML"),
        ("- What?", "must hold a list `questions`"),
        ("questions: []", "must hold a list `questions`"),
        ("questions: [What, 3]", "must hold a list `questions`"),
        ("questions: [What]\nmore: 1", "and nothing else"),
        ("questions: [What, Who, What]", "'What' is there twice"),
    ],
)
def test_questions_of_ones_own_are_checked(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_questions(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_questions(tmp_path / "none.yaml")
    path.write_text("questions: [What, Who]")
    assert load_questions(path) == ["What", "Who"]
