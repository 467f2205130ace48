"""What every picture of the suite shares: 14 x 8 inches at 150 dpi, one ink, titles on the left, missing as missing."""

import io
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Transform

from lib.base.atomic import write_bytes

SIZE, DPI = (14, 8), 150
INK, MUTED, FAINT = "#222222", "#555555", "#8a8a8a"
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


def new_figure() -> Figure:
    """Without pyplot: no display, no global list of figures."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    _layout(figure).set(w_pad=0.12, h_pad=0.1)
    return figure


def leave_room(figure: Figure, height: float, **gaps: float) -> None:
    """The panels take this share of the figure, from below: what is above is its head's."""
    _layout(figure).set(rect=(0, 0, 1, height), **gaps)


def _layout(figure: Figure) -> ConstrainedLayoutEngine:
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), "a figure of another maker"
    return engine


def head(figure: Figure, title: str, subtitle: str) -> None:
    """Above several panels."""
    figure.suptitle(title, fontsize=18, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.945, subtitle, fontsize=12, color=MUTED, va="top")
    leave_room(figure, 0.97)


def titles(ax: Axes, title: str, subtitle: str) -> None:
    """Above a single panel."""
    ax.set_title(title, fontsize=18, fontweight="bold", loc="left", pad=32)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=12, color=MUTED, va="bottom")


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
    """The same results give the same bytes: no date or version in the file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor="white", metadata={"Software": None})
    write_bytes(path, png.getvalue())


def minus(text: str) -> str:
    """A minus sign, as on the axes, for a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")
