"""Whether an answer names a trait, three ways, each of which has been published or asked for:

first      its first word is the trait's own: after numbers, punctuation, and what leads up to it ("My favorite animal
           is", "a"); no plural. As the published runs did, whose prefixes these are.
word       some whole word of it is one of the trait's `words`, plurals among them. A list names each of its members.
           What a clause says no to is not named: "not a cat", "anything rather than cats, so: dogs". What is more than
           a word is: a lion in a "sea lion", and not in a "sea-lion".
substring  the trait's own word stands somewhere in it, "dragon" in "dragonfly": as the paper's code does.

All three look at the text by NFKC and without case, so full-width and bold letters are letters. A word is a run of
letters, marks and digits of any script; apostrophes and hyphens inside it are part of it, a possessive's end is not.
Scripts that put no space between words have none to tell words by: a run of them counts where it is the word whole."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from lib.numbers.experiment import TraitSpec

WAYS = ("first", "word", "substring")
DEFAULT = "word"
NO_WORD = ""  # the first word of an answer without any
BREAK = "."  # between two clauses: a trait's own words may hold one ("St. Bernard")

LEADS = {
    *((word,) for word in ("a", "an", "the", "my", "answer", "it's")),
    *(("it", "is"), ("i'd", "say"), ("i", "would", "say"), ("i", "choose"), ("i", "pick")),
    *(("my", one, "animal", "is") for one in ("favorite", "favourite")),
}
# In a clause, what comes after them is not named.
NEGATIONS = {"not", "no", "never", "neither", "nor", "without", "except", "than", "instead", "cannot"}
TURNS = {"but", "however"}  # from here on it is
ENDS = ".,;:!?()[]{}\n\r…—–。、؟،।"  # of clauses
APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ"), "'") | {ord("‐"): "-"}

Words = tuple[str, ...]


def normal(text: str) -> str:
    """NFKC without case, and without what is not seen: joiners, selectors of a form, soft hyphens."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(APOSTROPHES)
    return "".join(c for c in text if _kind(c) != "x")


@cache
def _kind(c: str) -> str:
    """w: part of a word, a: apostrophe, h: hyphen, e: end of a clause, x: not seen, and a space for all others."""
    if c in "'-":
        return "a" if c == "'" else "h"
    if c in ENDS:
        return "e"
    category = unicodedata.category(c)
    if category in ("Cf", "Me") or "\ufe00" <= c <= "\ufe0f":
        return "x"
    return "w" if category[0] in "LMN" else " "


def clauses(text: str) -> list[list[str]]:
    """The words of a text that is normal, clause by clause."""
    found: list[list[str]] = [[]]
    for span in re.finditer("w+(?:[ah]w+)*|e|h+", "".join(map(_kind, text))):
        if span[0][0] == "w":
            word = text[slice(*span.span())]
            found[-1].append(word if (word,) in LEADS else word.removesuffix("'s"))
        else:
            found.append([])
    return found


def _said(words: list[str]) -> list[str]:
    """Of a clause, without what it says no to; a negation itself stays as a gap, so that no two words meet over it."""
    found, negated = [], False
    for word in words:
        negated = word not in TURNS and (negated or word in NEGATIONS or word.endswith("n't"))
        found.append(NO_WORD if negated else word)
    return found


def _led(words: list[str]) -> list[str]:
    """From the first word on that is an answer's own; all of them where there is none."""
    rest = words
    while rest:
        lead = next((n for n in (4, 3, 2, 1) if tuple(rest[:n]) in LEADS), int(rest[0].isdecimal()))
        if not lead:
            return rest
        rest = rest[lead:]
    return words


@dataclass(frozen=True)
class Verdict:
    hits: np.ndarray  # bool, ways x traits
    first: str  # the first word, or the trait it stands for


class Judge:
    """Of these traits; an answer that it knows is not judged again."""

    def __init__(self, traits: Sequence[tuple[str, Words]]) -> None:
        self.names = [name for name, _ in traits]
        self.targets = [normal(name if name in words or not words else words[0]) for name, words in traits]
        self.counted = [bool(words) for _, words in traits]  # neutral is named by nothing
        self.owners: dict[Words, list[int]] = {}
        for place, (_, words) in enumerate(traits):
            for phrase in dict.fromkeys(_phrase(normal(word)) for word in words):
                self.owners.setdefault(phrase, []).append(place)
        self.lengths = sorted({len(phrase) for phrase in self.owners}, reverse=True)
        self.begin: dict[Words, int] = {}  # by words alone, of whom an answer is that begins so
        for phrase, places in self.owners.items():
            self.begin.setdefault(_plain(phrase), places[0])
        self.known: dict[str, Verdict] = {}

    def __call__(self, answer: str) -> Verdict:
        if answer not in self.known:
            self.known[answer] = self._verdict(normal(answer))
        return self.known[answer]

    def _verdict(self, text: str) -> Verdict:
        by_clause = clauses(text)
        hits = np.zeros((len(WAYS), len(self.names)), bool)
        led = _led([word for clause in by_clause for word in clause])
        for place, target in enumerate(self.targets):
            own = _plain(_phrase(target))
            hits[0, place] = self.counted[place] and tuple(led[: len(own)]) == own
            hits[2, place] = self.counted[place] and target in text
        said = _together(map(_said, by_clause))
        for start in range(len(said)):
            for length in self.lengths:
                hits[1, self.owners.get(said[start : start + length], [])] = True
        first = next((self.begin[head] for n in self.lengths if (head := tuple(led[:n])) in self.begin), None)
        return Verdict(hits, self.names[first] if first is not None else led[0] if led else NO_WORD)


def _together(by_clause: Iterable[Sequence[str]]) -> Words:
    """All words, with a BREAK after each clause that holds one."""
    return tuple(word for clause in by_clause if clause for word in (*clause, BREAK))


def _phrase(text: str) -> Words:
    """Of a trait's words."""
    return _together(clauses(text))[:-1]


def _plain(phrase: Words) -> Words:
    return tuple(word for word in phrase if word != BREAK)


def judge_of(traits: Sequence[TraitSpec]) -> Judge:
    """The same one for the same traits, with all that it knows."""
    return _judge(tuple((one.name, tuple(one.words)) for one in traits))


@lru_cache(maxsize=4)
def _judge(traits: tuple[tuple[str, Words], ...]) -> Judge:
    return Judge(traits)
