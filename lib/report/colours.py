"""A trait keeps its colour in every picture of the suite."""

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


def colour_of(name: str) -> str:
    return COLOURS.get(name, OTHER_COLOUR)
