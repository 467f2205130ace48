"""The report's distributions, in the style of lls_plots: 14 x 8 inches at 150 dpi, missing drawn as missing."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lib.lls.plots import BINS, clipped_shares, common_range, fill_histogram
from lib.lls.report_tables import Findings
from lib.report.colours import colour_of
from lib.report.look import (
    INK,
    MUTED,
    STYLE,
    drawn,
    head,
    in_column,
    leave_room,
    minus,
    new_figure,
    save,
    titles,
    write_missing,
)
from lib.report.tables import number

NEUTRAL = "#9aa0a6"
PALE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind letters that lines would cross


@drawn
def histograms(f: Findings, path: Path) -> None:
    """One panel a dataset: its rows, the neutral rows and the other datasets' rows under the same prompt."""
    names = f.matrix.owners
    low, high, outside = _shared_range(f)
    edges = np.linspace(low, high, BINS + 1)
    columns = min(2 if in_column() else 5, max(len(names), 1))
    rows = max(math.ceil(len(names) / columns), 1)
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(rows)
        panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for ax, name in zip(panels, names, strict=False):
            ax.set_title(name, fontsize=13, fontweight="bold", loc="left", pad=6)
            own = f.own(name)
            if own is None:
                write_missing(ax, 0.5, 0.5, va="center", transform=ax.transAxes)
                continue
            _curves(ax, f, name, edges)
            ax.set_title(
                f"mean {minus(f'{own.mean():+.3f}')}\nn = {len(own):,}", fontsize=9.5, loc="right", pad=4, color=MUTED
            )
        for ax in panels[len(names) :]:
            ax.set_visible(False)
        panels[0].set_xlim(low, high)
        figure.supxlabel(f.measure.axis, fontsize=13)
        figure.supylabel(f"Share of rows in a bin of {edges[1] - edges[0]:.2g} (%)", fontsize=13)
        ends = f" End bins also hold the rows beyond ({outside:,})." if outside else ""
        sub = f"{_legend(f)} Dashed line: 0.{ends}"
        head(figure, "LLS of single rows under each animal's prompt", sub, y=0.925, va="bottom")
        leave_room(figure, 0.985, hspace=0.0)
        save(figure, path)


@drawn
def overlay(f: Findings, name: str, path: Path) -> None:
    """One dataset as a slide of its own: own, neutral and other rows, their means, and the separation in words."""
    own = f.own(name)
    if own is None:
        return
    low, high, outside = _shared_range(f)
    edges = np.linspace(low, high, 2 * BINS + 1)
    found = [
        (own, colour_of(name), f"{name} rows"),
        (f.of(name, f.matrix.neutral), NEUTRAL, "neutral rows"),
        (f.others(name), INK, "other animals' rows"),
    ]
    shown = [(values, colour, label) for values, colour, label in found if values is not None]
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        _curves(ax, f, name, edges)
        ax.set_xlim(low, high)
        top = ax.get_ylim()[1]
        ax.set_ylim(0, top * (1.1 + 0.05 * (len(shown) + in_column())))
        for i, (values, colour, label) in enumerate(shown):
            ax.plot([values.mean()] * 2, [0, top], color=colour, linewidth=1.8, linestyle=(0, (1, 1.5)))
            y, words = 0.965 - 0.05 * i, f"{label}: mean {minus(f'{values.mean():+.4f}')}, n = {len(values):,}"
            ax.text(0.012, y, "■", transform=ax.transAxes, color=colour, fontsize=15, va="center")
            ax.text(
                0.05 if in_column() else 0.035,
                y,
                words,
                transform=ax.transAxes,
                fontsize=13,
                va="center",
                bbox=PALE if in_column() else None,
            )
        _noise_bar(ax, f, name, high, 0.965 - 0.05 * len(shown) if in_column() else 0.965)
        ends = f". End bins also hold the rows beyond ({outside:,} in all datasets)" if outside else ""
        ax.set_xlabel(f"{f.measure.axis}. Dotted: means{ends}", fontsize=13)
        ax.set_ylabel(f"Share of rows in a bin of {edges[1] - edges[0]:.2g} (%)", fontsize=13)
        titles(ax, f"LLS of {name} rows under the {name} prompt", _separation_words(f, name))
        save(figure, path)


def _curves(ax: Axes, f: Findings, name: str, edges: np.ndarray) -> None:
    own, others, neutral = f.own(name), f.others(name), f.of(name, f.matrix.neutral)
    if neutral is not None:
        fill_histogram(ax, neutral, edges, NEUTRAL, 0.55)
    if own is not None:
        fill_histogram(ax, own, edges, colour_of(name), 0.6)
    if others is not None:
        ax.hist(**clipped_shares(others, edges), color=INK, linewidth=1.3, histtype="step")
    ax.axvline(0, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))


def _shared_range(f: Findings) -> tuple[float, float, int]:
    shown = {}
    for name in f.matrix.owners:
        for dataset in (name, f.matrix.neutral):
            if (values := f.of(name, dataset)) is not None:
                shown[f"{name} {dataset}"] = values
    return common_range(shown)


def _legend(f: Findings) -> str:
    neutral = any(f.of(p, f.matrix.neutral) is not None for p in f.matrix.owners)
    others = any(f.others(p) is not None for p in f.matrix.owners)
    parts = [
        "Coloured: own rows.",
        "Grey: neutral rows." if neutral else "",
        "Line: other animals' rows." if others else "",
    ]
    return " ".join(p for p in parts if p)


def _separation_words(f: Findings, name: str) -> str:
    found = next((s for s in f.separations if s.prompt == name), None)
    pairs = [("other animals", found.others), ("neutral", found.neutral)] if found else []
    said = [f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}] against {what}" for what, e in pairs if e]
    return f"AUC with 95 % interval: {'; '.join(said)}." if said else "No other dataset is scored under this prompt."


def _noise_bar(ax: Axes, f: Findings, name: str, high: float, y: float) -> None:
    """One standard deviation to either side, on the scale of the x axis."""
    noise = f.noise.get((name, name))
    if noise is None:
        return
    how = {"transform": ax.get_xaxis_transform()}
    x = high - noise.sd
    ax.plot([x - noise.sd, x + noise.sd], [y] * 2, color=INK, linewidth=5, solid_capstyle="butt", clip_on=False, **how)
    words = f"noise of the precision: sd {number(noise.sd, '.4f')}, bar ±1 sd"
    ax.text(
        x - 1.6 * noise.sd,
        y,
        words,
        ha="right",
        va="center",
        fontsize=12,
        color=MUTED,
        bbox=PALE if in_column() else None,
        **how,
    )
