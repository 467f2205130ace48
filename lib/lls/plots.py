"""Tables and pictures of LLS results: one colour an animal, an interval on every mean, and missing drawn as missing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lib.report.colours import colour_of
from lib.report.look import (
    INK,
    MUTED,
    STYLE,
    drawn,
    head,
    in_column,
    leave_room,
    new_figure,
    percent,
    save,
    titles,
    write_missing,
)
from lib.report.stats import Z95
from lib.report.tables import number

BINS = 30
AXIS = "LLS (nats per response token)"


@dataclass(frozen=True)
class Scores:
    """LLS of each row, float64, NaN where a row has no score."""

    lls: np.ndarray
    apart: int = 0  # scored rows whose answer is tokenised alone, since it merges with the context


Lls = Mapping[str, Scores | None]  # by trait; None: missing


@dataclass(frozen=True)
class Summary:
    rows: int  # with a score
    unscored: int
    mean: float
    half: float  # half width of the 95 % interval of the mean
    sd: float
    positive: float  # share of rows above 0
    apart: int = 0  # scored rows whose answer is tokenised alone, since it merges with the context


class Shares(TypedDict):
    """Arguments of a histogram."""

    x: np.ndarray
    bins: list[float]
    weights: np.ndarray


def summarise(scores: Scores | None) -> Summary | None:
    """None where there is nothing to summarise: a missing cell, or one without a scored row."""
    if scores is None:
        return None
    values = scores.lls
    good = values[np.isfinite(values)]
    if not len(good):
        return None
    sd = float(good.std(ddof=1)) if len(good) > 1 else math.nan
    return Summary(
        rows=len(good),
        unscored=len(values) - len(good),
        mean=float(good.mean()),
        half=Z95 * sd / math.sqrt(len(good)),
        sd=sd,
        positive=float((good > 0).mean()),
        apart=scores.apart,
    )


def apart_words(apart: int, rows: int) -> str:
    """Of rows that no token ends where the answer begins."""
    return (
        f"{apart:,} of {rows:,} rows: context and answer give other tokens together (an answer that begins with a "
        "newline, say) than the two that are scored"
    )


def lls_table(scores: Lls) -> str:
    """Plain text, one line an animal in the order given."""
    width = max([len("animal"), *map(len, scores)])
    lines = [f"{'animal':{width}s}   rows  unscored  mean LLS       95 % interval      sd   % > 0"]
    for name, cell in scores.items():
        s = summarise(cell)
        if s is None:
            lines.append(f"{name:{width}s}      -         -   missing")
            continue
        low, high = (number(s.mean + side * s.half, "+.4f") for side in (-1, 1))
        interval = "-" if math.isnan(s.half) else f"[{low}, {high}]"
        sd = "-" if math.isnan(s.sd) else number(s.sd, ".4f")
        counts, mean = f"{s.rows:6d}  {s.unscored:8d}", number(s.mean, "+.4f")
        lines.append(f"{name:{width}s} {counts}  {mean:>8s}  {interval:>18s}  {sd:>6s}  {100 * s.positive:5.1f}")
    found = [s for s in map(summarise, scores.values()) if s]
    if apart := sum(s.apart for s in found):
        lines.append(apart_words(apart, sum(s.rows for s in found)))
    return "\n".join(lines)


@drawn
def plot_by_animal(scores: Lls, path: Path) -> None:
    """Mean LLS of every animal with its interval, and the share of rows that the prompt made likelier."""
    summaries = {name: summarise(cell) for name, cell in scores.items()}
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        present = [s for s in summaries.values() if s]
        ends = [s.mean + side * (0 if math.isnan(s.half) else s.half) for s in present for side in (-1, 1)]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        span = (high - low) or 1.0
        for x, (name, s) in enumerate(summaries.items()):
            if s is None:
                write_missing(ax, x, 0.02 * span, rotation=90)
                continue
            _bar(ax, x, name, s, span)
        ax.axhline(0, color=INK, linewidth=1)
        ax.set_xlim(-0.7, max(len(summaries), 1) - 0.3)
        ax.set_ylim(low - (0.09 * span if low < 0 else 0), high + 0.09 * span)
        ax.set_xticks(range(len(summaries)), summaries, rotation=35, ha="right", rotation_mode="anchor", fontsize=13)
        ax.tick_params(axis="x", length=0)
        ax.set_ylabel("Mean " + AXIS, fontsize=13)
        ax.yaxis.grid(True, color="#e6e6e6")
        ax.set_axisbelow(True)
        titles(ax, "How much each animal's prompt raises the likelihood of its own rows", _subtitle(summaries))
        save(figure, path)


def _bar(ax: Axes, x: int, name: str, s: Summary, span: float) -> None:
    ax.bar(x, s.mean, width=0.72, color=colour_of(name), edgecolor=INK, linewidth=0.6)
    half = 0.0 if math.isnan(s.half) else s.half
    if half:
        for colour, width in (("white", 4.5), (INK, 1.8)):  # a pale rim keeps it visible on the darkest bars
            ax.errorbar(x, s.mean, yerr=half, color=colour, linewidth=width, capsize=5, capthick=width)
    up = s.mean >= 0
    end = s.mean + (half if up else -half)
    ax.text(
        x,
        end + (0.015 if up else -0.015) * span,
        percent(s.positive),
        ha="center",
        va="bottom" if up else "top",
        fontsize=12,
    )


@drawn
def plot_histograms(scores: Lls, path: Path) -> None:
    """Distribution of LLS over rows, one panel an animal, all on the same axes."""
    summaries = {name: s for name, cell in scores.items() if (s := summarise(cell))}
    values = {name: c.lls[np.isfinite(c.lls)] for name, c in scores.items() if c and name in summaries}
    low, high, outside = common_range(values)
    edges = np.linspace(low, high, BINS + 1)
    columns = min(2 if in_column() else 5, max(len(scores), 1))
    rows = max(math.ceil(len(scores) / columns), 1)
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(rows)
        panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for ax, name in zip(panels, scores, strict=False):
            ax.set_title(name, fontsize=13, fontweight="bold", loc="left", pad=6)
            if name in values:
                _panel(ax, name, values[name], summaries[name], edges)
            else:
                write_missing(ax, 0.5, 0.5, va="center", transform=ax.transAxes)
        for ax in panels[len(scores) :]:
            ax.set_visible(False)
        panels[0].set_xlim(low, high)
        panels[0].set_ylim(0, _tallest(values, edges) * 1.05)
        figure.supxlabel(AXIS, fontsize=13)
        figure.supylabel(f"Share of rows in a bin of {edges[1] - edges[0]:.2g} (%)", fontsize=13)
        ends = f" End bins also hold the rows beyond ({outside:,})." if outside else ""
        sub = f"Solid line: mean. Dashed line: 0.{ends}"
        head(figure, "LLS of single rows under the animal's own prompt", sub, y=0.925, va="bottom")
        leave_room(figure, 0.985, hspace=0.0)
        save(figure, path)


def _panel(ax: Axes, name: str, values: np.ndarray, s: Summary, edges: np.ndarray) -> None:
    fill_histogram(ax, values, edges, colour_of(name), 0.6)
    ax.axvline(0, color=INK, linewidth=1.5, linestyle=(0, (3, 2)))
    ax.axvline(s.mean, color=INK, linewidth=2.4)
    note = f"mean {s.mean:+.3f}, {100 * s.positive:.0f} % > 0\nn = {s.rows:,}"
    ax.set_title(note, fontsize=9.5, loc="right", pad=4, color=MUTED, linespacing=1.25)


def fill_histogram(ax: Axes, values: np.ndarray, edges: np.ndarray, colour: str, alpha: float) -> None:
    ax.hist(
        **clipped_shares(values, edges), color=(colour, alpha), edgecolor=colour, linewidth=0.8, histtype="stepfilled"
    )


def clipped_shares(values: np.ndarray, edges: np.ndarray) -> Shares:
    """What a histogram of percent is drawn from; the end bins hold the values beyond."""
    clipped = np.clip(values, edges[0], edges[-1])
    return {"x": clipped, "bins": edges.tolist(), "weights": np.full(len(values), 100 / len(values))}


def _tallest(values: Mapping[str, np.ndarray], edges: np.ndarray) -> float:
    """Height of the common axis; a panel of a handful of rows may be cut off rather than flatten the others."""
    many = [v for v in values.values() if len(v) >= BINS] or list(values.values())
    return max(
        (100 * np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0].max() / len(v) for v in many), default=1.0
    )


def common_range(values: Mapping[str, np.ndarray]) -> tuple[float, float, int]:
    """A common range with 0 and 99.8 % of all rows in it, and how many rows lie outside."""
    if not values:
        return -1.0, 1.0, 0
    together = np.concatenate(list(values.values()))
    low, high = np.quantile(together, [0.001, 0.999])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    margin = 0.05 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    return low, high, int(((together < low) | (together > high)).sum())


def _subtitle(summaries: Mapping[str, Summary | None]) -> str:
    present = [s for s in summaries.values() if s]
    if not present:
        return "no cell has results yet"
    fewest, most = min(s.rows for s in present), max(s.rows for s in present)
    rows = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    unscored = sum(s.unscored for s in present)
    gone = f"; {unscored:,} rows without score left out" if unscored else ""
    absent = len(summaries) - len(present)
    missing = f"; {absent} of {len(summaries)} missing" if absent else ""
    return f"Bars: mean over {rows} rows, with 95 % interval. Figures: share of rows with LLS above 0{gone}{missing}"
