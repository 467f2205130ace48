"""What every picture of the suite shares: 14 x 8 inches at 150 dpi, one ink, titles on the left, missing as missing.

Beside each PNG lie an SVG and a PDF. SUITE_FIGURES says which are wanted, "png svg pdf" by default; with `column` among
them each is drawn once more as wide as a column of a paper, without its titles, which there are the caption's."""

import io
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Transform

from lib.base.atomic import write_bytes
from lib.base.errors import UserError

SIZE, DPI = (14, 8), 150
COLUMN, COLUMN_DPI = 3.25, 300  # inches: a column of most journals
SMALL, READABLE = 0.5, 5.5  # a column's letters and lines are half as large, letters not below so many points
WORDS = ("png", "svg", "pdf", "column")
# No date and no version: the same results give the same bytes.
METADATA = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
INK, MUTED, FAINT, GRID = "#222222", "#555555", "#8a8a8a", "#e6e6e6"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


P = ParamSpec("P")
_column = False  # what is being drawn now


def wanted() -> list[str]:
    """The words of SUITE_FIGURES; PNGs are always among them, since pages show them."""
    words = os.environ.get("SUITE_FIGURES", "png svg pdf").split()
    if wrong := [word for word in words if word not in WORDS]:
        raise UserError(f"SUITE_FIGURES={' '.join(words)}: {wrong[0]} is none of {', '.join(WORDS)}")
    return list(dict.fromkeys(["png", *words]))


def drawn(plot: Callable[P, None]) -> Callable[P, None]:
    """A picture in each size that is wanted."""

    @wraps(plot)
    def in_all_sizes(*args: P.args, **how: P.kwargs) -> None:
        global _column
        for _column in (False, True) if "column" in wanted() else (False,):
            try:
                plot(*args, **how)
            finally:
                _column = False

    return in_all_sizes


def in_column() -> bool:
    return _column


def letters(points: float) -> float:
    """For what takes its own size from its letters', a legend."""
    return max(READABLE, SMALL * points) if _column else points


def roomy(places: int) -> bool:
    """Whether each of so many places beside each other has room for a number of its own."""
    return not _column or places <= 6


def percent(share: float) -> str:
    """A column's fifteen bars stand too close for the sign."""
    return f"{100 * share:.0f}" + ("" if _column else " %")


def new_figure(rows: int = 1) -> Figure:
    """Without pyplot: no display, no global list of figures. `rows` of panels make a column's height."""
    size = (COLUMN, max(2.4, 1.1 * rows)) if _column else SIZE
    figure = Figure(figsize=size, dpi=COLUMN_DPI if _column else DPI, layout="constrained")
    w_pad, h_pad = (0.03, 0.03) if _column else (0.12, 0.1)
    _layout(figure).set(w_pad=w_pad, h_pad=h_pad)
    return figure


def leave_room(figure: Figure, height: float, **gaps: float) -> None:
    """The panels take this share of the figure, from below: what is above is its head's."""
    _layout(figure).set(rect=(0, 0, 1, 1 if _column else height), **gaps)


def _layout(figure: Figure) -> ConstrainedLayoutEngine:
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), "a figure of another maker"
    return engine


def head(figure: Figure, title: str, subtitle: str, y: float = 0.945, va: Literal["top", "bottom"] = "top") -> None:
    """Above several panels."""
    if not _column:
        figure.suptitle(title, fontsize=18, fontweight="bold", x=0.01, ha="left")
        figure.text(0.01, y, subtitle, fontsize=12, color=MUTED, va=va)
    leave_room(figure, 0.97)


def titles(ax: Axes, title: str, subtitle: str) -> None:
    """Above a single panel."""
    if not _column:
        ax.set_title(title, fontsize=18, fontweight="bold", loc="left", pad=32)
        ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=12, color=MUTED, va="bottom")


def grid_lines(ax: Axes) -> None:
    """Of the values, behind what is drawn."""
    ax.yaxis.grid(True, color=GRID)
    ax.set_axisbelow(True)


def write_missing(
    ax: Axes,
    x: float,
    y: float,
    words: str = "missing",
    *,
    rotation: float = 0,
    va: Literal["center", "bottom"] = "bottom",
    transform: Transform | None = None,
) -> None:
    """At a place in the data, or in what `transform` measures."""
    where = ax.transData if transform is None else transform
    how = {"color": FAINT, "style": "italic", "fontsize": 13}
    ax.text(x, y, words, rotation=rotation, ha="center", va=va, transform=where, **how)


def save(figure: Figure, path: Path) -> None:
    """As `path` says, a PNG, and beside it in the other forms that are wanted."""
    if _column:
        path = path.with_stem(f"{path.stem}_column")
        _shrink(figure)
    # salt: else SVG's ids are drawn at random; 42: letters stay letters
    late = (
        {"font.size": SMALL * mpl.rcParams["font.size"]} if _column else {}
    )  # of ticks that are made at the last moment
    with mpl.rc_context({"svg.hashsalt": "suite", "pdf.fonttype": 42, **late}):
        for form in [word for word in wanted() if word in METADATA]:
            out = io.BytesIO()
            figure.savefig(out, format=form, facecolor="white", metadata=METADATA[form])
            write_bytes(path.with_suffix(f".{form}"), out.getvalue())


def _shrink(figure: Figure) -> None:
    """Letters, lines and marks that were chosen for a slide, for a column."""
    for ax in figure.axes:
        ax.tick_params(which="both", length=1.5, width=0.5, pad=1.5)
    for artist in figure.findobj():
        if isinstance(artist, Text):
            artist.set_fontsize(letters(float(artist.get_fontsize())))
            if isinstance(artist, Annotation) and artist.anncoords == "offset points":
                x, y = artist.xyann
                artist.xyann = SMALL * x, SMALL * y
        elif isinstance(artist, Line2D):
            artist.set_linewidth(SMALL * artist.get_linewidth())
            artist.set_markersize(SMALL * artist.get_markersize())
            artist.set_markeredgewidth(SMALL * artist.get_markeredgewidth())
        elif isinstance(artist, Patch):
            artist.set_linewidth(SMALL * artist.get_linewidth())
        elif isinstance(artist, Collection):
            artist.set_linewidth((SMALL * np.asarray(artist.get_linewidth())).tolist())


def minus(text: str) -> str:
    """A minus sign, as on the axes, for a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")
