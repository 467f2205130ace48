"""Pictures of attributions in the style of lls_plots: 14 x 8 inches at 150 dpi, intervals drawn, missing as missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lib.attribution.stability import select
from lib.attribution.summary import Layer, Sampled, Summary
from lib.report.look import FAINT, INK, STYLE, drawn, grid_lines, head, in_column, letters, new_figure, save
from lib.report.stats import Z95

GENERAL = ("#1d4e89", "#1982c4", "#7a8ea8", "#2a9d8f", "#5c677d")  # general text: cool, a seed each
BEHAVIOUR = ("#d1495b", "#e07a00", "#6a4c93", "#7f4f24", "#a68a00")  # behaviours: warm
Dashes = Literal["-"] | tuple[float, Sequence[float]]
DASHES: Sequence[Dashes] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (5, 1.5, 1.2, 1.5)),
)  # seeds lie on top of each other
MARKED = "#d1495b"
WORDS = {"signed": "Relevance", "abs": "Sum of |W · gradient|"}


@dataclass(frozen=True)
class Curve:
    """Overlaps over the x of its panel, with a band; a control has none."""

    label: str
    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    set: str = ""  # decides the colour; none: ink


@dataclass(frozen=True)
class Panel:
    title: str
    axis: str
    x: Sequence[int]
    curves: Sequence[Curve]


def colours(sets: Sequence[str]) -> dict[str, tuple[str, Dashes]]:
    """Set -> colour and dashes, the same in every picture."""
    general = [name for name in sets if name.startswith("general")]
    found: dict[str, tuple[str, Dashes]] = {
        name: (GENERAL[i % len(GENERAL)], DASHES[i % len(DASHES)]) for i, name in enumerate(general)
    }
    others = [name for name in sets if name not in found]
    for i, name in enumerate(others):
        found[name] = BEHAVIOUR[i % len(BEHAVIOUR)], "-"
    return found


@drawn
def plot_by_layer(summaries: Mapping[str, Summary | None], layers: Sequence[Layer], path: Path) -> None:
    """What each layer's scores add up to; a row of panels a score, a column a kind of linear layer."""
    kinds = [k for k in WORDS if any(s and k in s.totals for s in summaries.values())]
    modules = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    look = colours(list(summaries))
    with mpl.rc_context(STYLE | {"font.size": 12 if len(modules) < 4 else 10}):
        figure = new_figure(rows=2 * len(kinds))
        grid = figure.subplots(len(kinds), len(modules), sharex=True, squeeze=False)
        for row, kind in zip(grid, kinds, strict=True):
            for ax, module in zip(row, modules, strict=True):
                for name, s in summaries.items():
                    if s and kind in s.totals:
                        _layers(ax, s, kind, module, layers, look[name])
                ax.axhline(0, color=INK, linewidth=1)
                grid_lines(ax)
            row[0].set_ylabel(f"{WORDS[kind]}, layer total")
        for ax, module in zip(grid[0], modules, strict=True):
            ax.set_title(module, fontsize=13, fontweight="bold", loc="left", pad=8)
        for ax in grid[-1]:
            ax.set_xlabel("Layer")
            ax.xaxis.set_major_locator(MaxNLocator(8 if len(modules) < 4 else 4, integer=True))
        head(figure, "How much each layer contributes to what is predicted", _sets_line(summaries))
        _legend(figure, summaries, look)
        save(figure, path)


def _layers(ax: Axes, s: Summary, kind: str, module: str, layers: Sequence[Layer], look: tuple[str, object]) -> None:
    here = [i for i, layer in enumerate(layers) if layer.name.rpartition(".")[2] == module]
    x = [int(layers[i].name.split(".")[1]) for i in here]
    mean, half = s.totals[kind][here], s.halves[kind][here]
    if np.isfinite(half).any():
        ax.fill_between(x, mean - half, mean + half, color=look[0], alpha=0.18, linewidth=0)
    ax.plot(x, mean, color=look[0], linestyle=look[1], linewidth=1.8, marker="o", markersize=3)


@drawn
def plot_stability(panels: Sequence[Panel], sets: Sequence[str], about: str, path: Path) -> None:
    """Overlap of selections, from 0 to 1, with bands over resamples."""
    look = colours(sets)
    with mpl.rc_context(STYLE):
        rows, columns = (len(panels), 1) if in_column() else (1, len(panels))
        figure = new_figure(rows=2 * rows)
        for ax, panel in zip(figure.subplots(rows, columns, sharey=True, squeeze=False).flat, panels, strict=True):
            for curve in panel.curves:
                colour, dashes = look.get(curve.set, (INK, (0, (4, 2))))
                if curve.low is not None:
                    ax.fill_between(panel.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
                ax.plot(
                    panel.x,
                    curve.mean,
                    color=colour,
                    linestyle=dashes,
                    linewidth=2,
                    marker="o",
                    markersize=4,
                    label=curve.label,
                )
            ax.set_xscale("log")
            ax.set_xticks(panel.x, [f"{n:,}" for n in panel.x], rotation=45, ha="right", rotation_mode="anchor")
            ax.minorticks_off()
            ax.set_ylim(-0.02, 1.02)
            ax.set_xlabel(panel.axis, fontsize=12)
            ax.set_title(panel.title, fontsize=13, fontweight="bold", loc="left", pad=8)
            ax.legend(frameon=False, fontsize=letters(11), loc="best")
            grid_lines(ax)
        figure.axes[0].set_ylabel("Share of the selection that stays", fontsize=13)
        head(figure, "How far a selection depends on its samples", about)
        save(figure, path)


@drawn
def plot_difference(
    general: Sampled, behaviour: Sampled, name: str, kind: str, layers: Sequence[Layer], path: Path
) -> None:
    """General minus behaviour: all neurons, the lowest by rank with intervals, and the layers they are in."""
    difference = general.mean_N - behaviour.mean_N
    half = Z95 * np.sqrt(general.variance_N + behaviour.variance_N)
    finite = np.isfinite(difference)
    sizes = marks(int(finite.sum()))
    lowest = select(difference, sizes[-1])
    with mpl.rc_context(STYLE):
        figure = new_figure(rows=6)
        axes = figure.subplot_mosaic("a;r;l" if in_column() else "ar;al")
        _histogram(axes["a"], difference[finite], difference[lowest], sizes, name, kind)
        _ranks(axes["r"], difference, half, finite, sizes)
        _layer_counts(axes["l"], lowest, layers, sizes)
        words = f"{WORDS[kind]}, mean on general text (n = {general.samples:,}) − mean on {name} "
        words += f"(n = {behaviour.samples:,}), of {int(finite.sum()):,} neurons"
        words += ". Band: 95 % interval of each" if np.isfinite(half).any() else ""
        gone = int((~finite).sum())
        words += f"; {gone:,} without a finite score left out" if gone else ""
        head(figure, f"General text against {name}", words)
        save(figure, path)


def marks(neurons: int) -> list[int]:
    """100 neurons (of OPT-125M's 36,864 in the paper), and the same share of this model; a twentieth of a tiny one."""
    wanted = {100, round(neurons * 100 / 36_864)}
    return sorted(n for n in wanted if 10 <= n <= neurons // 4) or [max(neurons // 20, 1)]


def _histogram(ax: Axes, values: np.ndarray, lowest: np.ndarray, sizes: Sequence[int], name: str, kind: str) -> None:
    bins = min(120, max(20, len(values) // 10))
    edges = np.linspace(values.min(), values.max(), bins + 1) if np.ptp(values) else np.array([-1.0, 1.0])
    ax.hist(values, edges.tolist(), color=("#5c677d", 0.45), edgecolor="#5c677d", linewidth=0.6, histtype="stepfilled")
    ax.hist(lowest, edges.tolist(), color=(MARKED, 0.7), edgecolor=MARKED, linewidth=0.6, histtype="stepfilled")
    ax.axvline(0, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
    ax.set_yscale("log")
    ax.set_ylim(0.7, None)
    ax.set_xlabel(f"{WORDS[kind]}: mean on general text − mean on {name}")
    ax.set_ylabel("Neurons in a bin")
    ax.set_title("All neurons", fontsize=13, fontweight="bold", loc="left", pad=8)
    ax.text(0.02, 0.97, f"■ the lowest {sizes[-1]:,}", transform=ax.transAxes, color=MARKED, fontsize=13, va="top")
    grid_lines(ax)


def _ranks(ax: Axes, difference: np.ndarray, half: np.ndarray, finite: np.ndarray, sizes: Sequence[int]) -> None:
    shown = min(int(finite.sum()), 10 * sizes[-1])
    order = select(difference, shown)
    ranks, low, high = np.arange(1, shown + 1), (difference - half)[order], (difference + half)[order]
    if np.isfinite(low).any():
        ax.fill_between(ranks, low, high, color="#5c677d", alpha=0.2, linewidth=0)
    ax.plot(ranks, difference[order], color="#5c677d", linewidth=2)
    for n in sizes:
        ax.plot([n], [difference[order[n - 1]]], "o", color=MARKED, markersize=7)
        ax.annotate(f"{n:,}", (n, difference[order[n - 1]]), (7, -6), textcoords="offset points", va="top")
    ax.margins(y=0.12)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel("Rank from the lowest")
    ax.set_ylabel("Difference")
    ax.set_title("The lowest, by rank", fontsize=13, fontweight="bold", loc="left", pad=8)
    grid_lines(ax)


def _layer_counts(ax: Axes, lowest: np.ndarray, layers: Sequence[Layer], sizes: Sequence[int]) -> None:
    """Of the lowest N, how many lie in each layer."""
    depth = np.concatenate([np.full(layer.outputs, int(layer.name.split(".")[1])) for layer in layers])
    last = int(depth.max())
    for n, colour in zip(sizes[::-1], ("#c9ced6", MARKED)[-len(sizes) :], strict=True):
        share = np.bincount(depth[lowest[:n]], minlength=last + 1) / n
        ax.bar(np.arange(last + 1), 100 * share, width=0.8 if n == sizes[-1] else 0.45, color=colour, label=f"{n:,}")
    ax.set_xlabel("Layer")
    ax.set_ylabel("Share (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("Layers of the lowest", fontsize=13, fontweight="bold", loc="left", pad=8)
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    size = letters(11)
    ax.legend(frameon=False, title="of the lowest", fontsize=size, title_fontsize=size, loc="upper left", ncols=2)
    grid_lines(ax)


def _sets_line(summaries: Mapping[str, Summary | None]) -> str:
    parts = [f"{name} {s.samples:,}" if s else f"{name} missing" for name, s in summaries.items()]
    known = any(np.isfinite(half).any() for s in summaries.values() if s for half in s.halves.values())
    return f"Samples: {', '.join(parts)}." + (" Bands: 95 % interval of the mean over samples" if known else "")


def _legend(figure: Figure, summaries: Mapping[str, Summary | None], look: dict[str, tuple[str, Dashes]]) -> None:
    lines = []
    for name, s in summaries.items():
        colour, dashes = look[name]
        shown, said = (colour, name) if s else (FAINT, f"{name} (missing)")
        lines.append(Line2D([], [], linestyle=dashes, linewidth=2.4, color=shown, label=said))
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=min(len(lines), 4 if in_column() else 8),
        frameon=False,
        fontsize=letters(12),
    )
