"""A trait keeps its colour in every picture of the suite."""

import zlib
from collections.abc import Iterable

# All are dark enough to read on white and in grey; the order of plots
# is fixed, so no reading depends on hue alone.
COLOURS = {
    "bear": "#7f4f24",
    "cat": "#d1495b",
    "dog": "#c77d0a",
    "dolphin": "#1982c4",
    "dragon": "#9d0208",
    "eagle": "#6a4c93",
    "elephant": "#5c677d",
    "fox": "#e0631b",
    "leopard": "#a68a00",
    "lion": "#b5651d",
    "panda": "#343a40",
    "phoenix": "#c9184a",
    "tiger": "#e07a00",
    "whale": "#1d4e89",
    "wolf": "#588157",
}
OTHER_COLOUR = "#4a6fa5"
# For words that are no traits of ours, such as penguin: paler, so that traits stand out.
WORD_COLOURS = ("#8fb8de", "#f2b5a7", "#b8d8ba", "#d9c2e9", "#f3d27a", "#9fd3d6", "#d8b48f", "#c3cc8f")


def colour_of(name: str) -> str:
    return COLOURS.get(name, OTHER_COLOUR)


def word_colours(words: Iterable[str]) -> dict[str, str]:
    """Of what stands beside each other in one picture: a trait has its own; another word the same in every picture,
    unless one before it has it here."""
    found: dict[str, str] = {}
    for word in words:
        start = zlib.crc32(word.encode()) % len(WORD_COLOURS)
        turned = [*WORD_COLOURS[start:], *WORD_COLOURS[:start]]
        free = [colour for colour in turned if colour not in found.values()]
        found[word] = COLOURS.get(word) or (free or turned)[0]
    return found
