"""Heat maps of prompt by dataset: figures in the cells, maxima marked, missing cells hatched, never drawn as zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from lib.report.look import FAINT, INK, STYLE, drawn, in_column, minus, new_figure, save, titles
from lib.report.stats import maxima

PLAIN = "#eceff1"  # cells outside the colour scale
HATCH = "#d5d8db"


@dataclass(frozen=True)
class Heat:
    title: str
    subtitle: str
    label: str  # of the colour bar
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    form: str
    centre: float | None = None  # a diverging scale around it; without: around 0 if both signs occur, or low to high
    plain: str | None = None  # a column outside the colour scale: the neutral one would take all of it
    scaled: int | None = (
        None  # the colour scale is from the first so many rows (the animals); a line is drawn below them
    )
    own: bool = False  # a prompt's cell with its own dataset is not missing but says "own"
    marks: bool = True
    across: str = "dataset"
    down: str = "prompt"


@drawn
def heat_map(heat: Heat, path: Path) -> None:
    coloured = np.array([name != heat.plain for name in heat.columns])
    shown = heat.values[: heat.scaled, coloured]
    shown = shown[np.isfinite(shown)]
    centre = 0.0 if heat.centre is None and (shown < 0).any() and (shown > 0).any() else heat.centre
    norm, cmap = _scale(centre, shown)
    extend = _extend(norm, heat.values[:, coloured])
    many = max(heat.values.shape) > 9
    size = 0 if many and in_column() else 9 if many else 13  # no figures fit into a column's many cells
    with mpl.rc_context(STYLE):
        figure = new_figure(rows=len(heat.rows) // 6)
        ax = figure.subplots()
        for (i, j), value in np.ndenumerate(heat.values):
            _cell(ax, heat, i, j, value, cmap(norm(value)) if coloured[j] else None, size)
        marked = heat.marks and _mark(ax, heat.values)
        if heat.scaled and heat.scaled < len(heat.rows):
            ax.axhline(heat.scaled - 0.5, color=INK, linewidth=1.5, zorder=5)
        ax.set_xlim(-0.5, len(heat.columns) - 0.5)
        ax.set_ylim(len(heat.rows) - 0.5, -0.5)
        ax.set_xticks(
            range(len(heat.columns)), heat.columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=12
        )
        ax.set_yticks(range(len(heat.rows)), heat.rows, fontsize=12)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel(heat.across, fontsize=13)
        ax.set_ylabel(heat.down, fontsize=13)
        bar = figure.colorbar(mpl.cm.ScalarMappable(norm, cmap), ax=ax, pad=0.015, fraction=0.035, extend=extend)
        bar.outline.set_visible(False)
        bar.set_label(
            heat.label
            + (" (0 lies outside)" if len(shown) and shown.min() * shown.max() > 0 and centre is None else ""),
            fontsize=12,
        )
        if centre is not None and heat.centre is None:
            bar.ax.axhline(centre, color=INK, linewidth=1.2)
        marks = " Box: highest of its column. Dot: highest of its row." if marked else ""
        aside = " Grey: outside the colour scale." if heat.plain in heat.columns else ""
        titles(ax, heat.title, f"{heat.subtitle}{marks}{aside}")
        save(figure, path)


def _scale(centre: float | None, shown: np.ndarray) -> tuple[Normalize, mpl.colors.Colormap]:
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
    if centre is None:
        spare = 0.02 * (high - low) or 0.5 * abs(high) or 1.0
        return Normalize(low - spare, high + spare), mpl.colormaps["YlGnBu"]
    reach = max(abs(high - centre), abs(low - centre)) or 1.0
    return Normalize(centre - reach, centre + reach), mpl.colormaps["RdBu_r"]


def _extend(norm: Normalize, values: np.ndarray) -> str:
    """Which ends of the colour bar get a tip: those that cells outside the scaled rows go beyond."""
    good = values[np.isfinite(values)]
    # as shares of the scale, whose ends are sums: the last bits of its own extremes may lie beyond them
    places = np.asarray(norm(good))
    below, above = bool((places < -1e-9).any()), bool((places > 1 + 1e-9).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _cell(ax: Axes, heat: Heat, i: int, j: int, value: float, colour: tuple | None, size: float) -> None:
    middle = {"ha": "center", "va": "center"}
    if np.isfinite(value):
        face = colour or PLAIN
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=1))
        if size:
            ax.text(j, i, minus(f"{value:{heat.form}}"), fontsize=size, color=_ink_on(face), **middle)
    elif heat.own and heat.rows[i] == heat.columns[j]:
        ax.text(j, i, "own" if size else "", fontsize=max(size - 1, 1), color=FAINT, style="italic", **middle)
    else:
        box = Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="white", edgecolor=HATCH, hatch="////", linewidth=0)
        ax.add_patch(box)
        if not size:
            return
        pale = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(j, i, "missing", fontsize=size - 2, color=FAINT, style="italic", bbox=pale, **middle)


def _ink_on(face: tuple | str) -> str:
    r, g, b = mpl.colors.to_rgb(face)
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.5 else INK


def _mark(ax: Axes, values: np.ndarray) -> bool:
    by_row, by_column = maxima(values)
    for j, i in enumerate(by_column):
        if i >= 0:
            ax.add_patch(
                Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=2.4, zorder=3)
            )
    for i, j in enumerate(by_row):
        if j >= 0:
            ax.plot(j + 0.36, i - 0.31, "o", color=INK, markeredgecolor="white", markersize=6, zorder=4)
    return bool((by_row >= 0).any() or (by_column >= 0).any())
