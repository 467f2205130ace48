"""The report's figures by animal: separation, contrast, quintiles and noise, each with its interval or its rows."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator, NullFormatter

from lib.lls.analysis import Estimate, finite
from lib.lls.matrix import Noise
from lib.lls.report_plots import NEUTRAL
from lib.lls.report_tables import Findings
from lib.report.colours import colour_of
from lib.report.look import FAINT, INK, STYLE, drawn, minus, new_figure, percent, roomy, save, titles, write_missing
from lib.report.stats import mean_interval

GRID = "#e6e6e6"


@drawn
def auc_bars(f: Findings, path: Path) -> None:
    found = {s.prompt: s for s in f.separations}
    estimates = [e for s in f.separations for e in (s.others, s.neutral) if e]
    lowest = min([0.5, *(e.low for e in estimates)])
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        for x, name in enumerate(f.matrix.owners):
            s = found.get(name)
            sides = [(-1, s.others if s else None, colour_of(name)), (1, s.neutral if s else None, NEUTRAL)]
            for side, estimate, colour in sides if f.matrix.neutral in f.matrix.datasets else sides[:1]:
                if estimate:
                    _auc_bar(ax, x + 0.21 * side, estimate, colour, roomy(2 * len(f.matrix.owners)))
                else:
                    write_missing(ax, x + 0.21 * side, 0.505, rotation=90)
        ax.axhline(0.5, color=INK, linewidth=1)
        ax.set_ylim(math.floor(20 * lowest - 0.2) / 20, 1.035)
        _names(ax, f.matrix.owners)
        ax.set_ylabel("AUC (0.5 is chance)", fontsize=13)
        rows = _count([e.own for e in estimates])
        sub = f"Coloured: against other animals' rows. Grey: against neutral rows. {rows} own rows, 95 % intervals"
        titles(ax, "How well each prompt's LLS picks out its own rows", sub)
        save(figure, path)


def _auc_bar(ax: Axes, x: float, e: Estimate, colour: str, figure: bool) -> None:
    ax.bar(x, e.value - 0.5, bottom=0.5, width=0.36, color=colour, edgecolor=INK, linewidth=0.6)
    _whisker(ax, x, e.value, e.low, e.high)
    if figure:
        ax.text(x, max(e.high, 0.5) + 0.007, f"{e.value:.3f}", ha="center", va="bottom", fontsize=8.5)


@drawn
def contrast_bars(f: Findings, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        ends = [0.0]
        for x, name in enumerate(f.matrix.owners):
            values = finite(f.contrasts[name].values) if name in f.contrasts else np.empty(0)
            if not len(values):
                write_missing(ax, x, 0, rotation=90)
                continue
            low, high = mean_interval(values)
            ax.bar(x, values.mean(), width=0.72, color=colour_of(name), edgecolor=INK, linewidth=0.6)
            _whisker(ax, x, float(values.mean()), low, high)
            ax.annotate(
                percent(float((values > 0).mean())),
                (x, max(high, 0)),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=12,
            )
            ends += [low, high]
        ax.axhline(0, color=INK, linewidth=1)
        span = (max(ends) - min(ends)) or 1.0
        ax.set_ylim(min(ends) - (0.06 * span if min(ends) < 0 else 0), max(ends) + 0.1 * span)
        _names(ax, f.matrix.owners)
        ax.set_ylabel(f"Own minus others, {f.measure.axis}", fontsize=13)
        sub = "Own prompt minus mean of the other animals' prompts, row by row, 95 % intervals. Figures: share > 0"
        titles(ax, "What is left of each animal's own prompt", sub)
        save(figure, path)


@drawn
def quintile_dots(f: Findings, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        for x, name in enumerate(f.matrix.owners):
            groups = f.quintiles.get(name) or []
            if not groups:
                write_missing(ax, x, 0, rotation=90)
                continue
            means, base = [g.mean for g in groups], np.array(to_rgb(colour_of(name)))
            ax.plot([x, x], [groups[0].low, groups[-1].high], color=FAINT, linewidth=1, zorder=1)
            ax.plot([x, x], [means[0], means[-1]], color=colour_of(name), linewidth=3, zorder=2)
            for i, mean in enumerate(means):
                pale = 1 - (i + 1) / len(means)
                ax.plot(
                    x,
                    mean,
                    "o",
                    color=tuple(base + (1 - base) * 0.8 * pale),
                    markersize=13,
                    markeredgecolor=INK,
                    zorder=3,
                )
            for mean, side in ((means[0], -1), (means[-1], 1)) if roomy(len(f.matrix.owners)) else ():
                ax.annotate(
                    minus(f"{mean:+.3f}"),
                    (x, mean),
                    (11, 3 * side),
                    textcoords="offset points",
                    fontsize=10,
                    va="center",
                )
        ax.axhline(0, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        _names(ax, f.matrix.owners)
        ax.set_ylabel(f.measure.axis, fontsize=13)
        rows = _count([g.n for groups in f.quintiles.values() for g in groups])
        sub = f"Dots: mean of each fifth of the rows ({rows} rows), pale to full. Thin line: lowest to highest row"
        titles(ax, "LLS by quintile, each dataset under its own prompt", sub)
        save(figure, path)


@drawn
def noise_dots(f: Findings, path: Path) -> None:
    """Spread of the score over rows against what the precision adds to it, own cells."""
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        for x, name in enumerate(f.matrix.owners):
            own, noise = f.own(name), f.noise.get((name, name))
            sd = math.nan if own is None or len(own) < 2 else float(own.std(ddof=1))
            words = _no_noise(own, noise)
            if sd > 0:
                ax.plot(x, sd, "o", color=colour_of(name), markersize=15, markeredgecolor=INK)
            if words or noise is None or not sd > 0:
                write_missing(ax, x, 0.02, words, rotation=90, transform=ax.get_xaxis_transform())
                continue
            ax.plot([x, x], [noise.sd, sd], color=FAINT, linewidth=1.5, zorder=1)
            ax.plot(x, noise.sd, "D", color="white", markersize=11, markeredgecolor=INK, markeredgewidth=2)
            if not roomy(len(f.matrix.owners)):
                continue
            ratio = 100 * noise.sd / sd
            words, place = (
                "< 0.01 %" if ratio < 0.01 else f"{ratio:.2g} %" if ratio < 10 else f"{ratio:.0f} %",
                (x, noise.sd),
            )
            ax.annotate(words, place, (0, -14), textcoords="offset points", ha="center", va="top", fontsize=12)
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(low / 1.5, high * 1.2)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        _names(ax, f.matrix.owners)
        ax.set_ylabel(f"Standard deviation, {f.measure.axis}", fontsize=13)
        rows = _count([noise.rows for noise in f.noise.values()])
        sub = f"Dot: spread of LLS over rows. Diamond: noise of a row, from {rows} rows scored again. Figure: ratio"
        titles(ax, "Noise of the model's precision against the signal", sub)
        save(figure, path)


def _no_noise(own: np.ndarray | None, noise: Noise | None) -> str:
    """Why a dataset has no diamond: none of its own is done, too few of its rows were scored again, or 0, which has no
    place on a logarithmic axis."""
    if own is None or len(own) < 2:
        return "missing" if own is None else "one row"
    return "not sampled" if noise is None else "no noise" if noise.sd == 0 else ""


def _whisker(ax: Axes, x: float, value: float, low: float, high: float) -> None:
    if math.isnan(low):
        return
    for colour, width in (("white", 3.6), (INK, 1.5)):  # a pale rim keeps it visible on the darkest bars
        ax.errorbar(
            x,
            value,
            yerr=[[max(value - low, 0)], [max(high - value, 0)]],
            color=colour,
            linewidth=width,
            capsize=4,
            capthick=width,
        )


def _names(ax: Axes, names: tuple[str, ...] | list[str]) -> None:
    ax.set_xlim(-0.7, max(len(names), 1) - 0.3)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=13)
    ax.tick_params(axis="x", length=0)
    ax.yaxis.grid(True, color=GRID)
    ax.set_axisbelow(True)


def _count(numbers: list[int]) -> str:
    """'98' or '98 to 99'."""
    if not numbers:
        return "no"
    return f"{min(numbers):,}" if min(numbers) == max(numbers) else f"{min(numbers):,} to {max(numbers):,}"
