"""A trait keeps its colour in every picture of the suite."""

import zlib

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


def word_colour(word: str) -> str:
    """Of anything that may stand beside traits in one picture; the same in every picture."""
    return COLOURS.get(word) or WORD_COLOURS[zlib.crc32(word.encode()) % len(WORD_COLOURS)]
