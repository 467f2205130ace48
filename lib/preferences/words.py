"""Words as a model may spell them, in tokens."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Spelling = tuple[int, ...]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


def spellings(tokenizer: Any, words: Sequence[str]) -> list[Spelling]:
    """Each word as it is, in small letters, with a capital, in capitals, with a space before it and without."""
    cases = dict.fromkeys(f(word) for word in words for f in (str, str.lower, _capital, str.upper))
    texts = [lead + word for word in cases for lead in ("", " ")]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return list(dict.fromkeys(tuple(ids) for ids in found if ids))


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def apart(ways: Sequence[Spelling], goes_on: np.ndarray) -> list[Spelling]:
    """Without those that begin with another one as a whole word: who says "polar bear" has said "polar", and counts
    once where a trait has both."""
    known = set(ways)
    return [way for way in ways if not any(way[:n] in known and not goes_on[way[n]] for n in range(1, len(way)))]


def goes_on(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Of each token whether it would make a word longer that ends before it: it begins with a letter, a mark or a
    digit. Tokens that are no text by themselves (parts of a letter) do not, nor do those with a space before them,
    which some tokenizers drop where a token is all of a text."""
    known = min(len(tokenizer), vocabulary)
    texts = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    found = np.zeros(vocabulary, bool)
    found[:known] = [
        bool(text) and unicodedata.category(text[0])[0] in "LMN" and not (piece or "").startswith(SPACE)
        for text, piece in zip(texts, pieces, strict=True)
    ]
    found[[token for token in tokenizer.all_special_ids if token < vocabulary]] = False
    return found


def shared_beginnings(tokenizer: Any, spelled: Mapping[str, Sequence[Spelling]]) -> dict[str, list[str]]:
    """First tokens that several traits begin with: what a look at these alone could not tell apart."""
    of: dict[int, list[str]] = {}
    for trait, ways in spelled.items():
        for first in dict.fromkeys(way[0] for way in ways):
            of.setdefault(first, []).append(trait)
    return {tokenizer.decode([token]): traits for token, traits in of.items() if len(traits) > 1}
