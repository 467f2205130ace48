"""Pictures of a sweep: toxicity and perplexity against the number of neurons, where the neurons lie, how rankings
overlap, and every prompt before and after."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lib.pruning.findings import MEASURES, Findings, Measure, Seen, interval
from lib.pruning.methods import DRAWN, WORDS, Method
from lib.report.look import (
    FAINT,
    INK,
    MUTED,
    STYLE,
    drawn,
    grid_lines,
    head,
    in_column,
    letters,
    new_figure,
    save,
    write_missing,
)

# Each is told by its marker and dashes too, in grey.
Dashes = Literal["-", "--"] | tuple[float, Sequence[float]]
LOOK: dict[Method, tuple[str, str, Dashes]] = {
    "lrp": ("#9d0208", "o", "-"),
    "absolute": ("#e07a00", "s", "-"),
    "gradient": ("#6a4c93", "^", (0, (5, 2))),
    "wanda": ("#1982c4", "D", (0, (5, 2))),
    "activation": ("#588157", "v", (0, (1, 1))),
    "undesired": ("#b5651d", "P", (0, (3, 1, 1, 1))),
    "magnitude": ("#343a40", "X", (0, (3, 1, 1, 1))),
    "matched": ("#5c677d", "", "-"),
    "random": ("#a3a9b2", "", "--"),
}


@drawn
def plot_effect(f: Findings, methods: Sequence[Method], path: Path) -> None:
    measures: list[Measure] = ["average", "maximum", "any"]
    with mpl.rc_context(STYLE):
        rows, columns = (3, 1) if in_column() else (1, 3)
        figure = new_figure(rows=6)
        for ax, measure in zip(figure.subplots(rows, columns, squeeze=False).flat, measures, strict=True):
            _against_size(ax, f, methods, partial(Seen.per_prompt, name=f.behaviour, judge=f.judge, measure=measure))
            words = MEASURES[measure]
            ax.set_title(words[:1].upper() + words[1:], fontsize=12, fontweight="bold", loc="left", pad=8)
        prompts, samples = f.dense.unique[f.behaviour].shape if f.dense else (0, 0)
        head(
            figure,
            f"{f.effect.capitalize()} on {f.behaviour} prompts, without the first N neurons of each ranking",
            f"{prompts} prompts, {samples} completions of each, by {f.judge}. Bars: 95 % over prompts. "
            "Grey: range of the random draws. Line: dense",
        )
        _legend(figure, methods)
        save(figure, path)


@drawn
def plot_harm(f: Findings, methods: Sequence[Method], path: Path) -> None:
    """What should not change."""
    dense, panels = f.dense, []
    for name in dense.perplexity if dense else {}:
        panels.append((f"Perplexity, {name}", lambda s, n=name: np.array([s.perplexity[n]])))
    for name in f.experiment.evaluate.neutral:
        panels.append((f"Mean {f.effect}, {name} prompts", lambda s, n=name: s.per_prompt(n, f.judge)))
    panels.append((f"RUR, {f.behaviour} prompts", lambda s: np.nanmean(s.unique[f.behaviour], 1)))
    with mpl.rc_context(STYLE):
        rows, columns = (len(panels), 1) if in_column() else (1, len(panels))
        figure = new_figure(rows=2 * len(panels))
        for ax, (title, value) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
            _against_size(ax, f, methods, value)
            ax.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=8)
            if title.startswith("Perplexity"):
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(MaxNLocator(5))
                ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
                ax.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.4g"))
        head(
            figure,
            "What should stay as it is",
            "Bars: 95 % over prompts. Grey: range of the random draws. Line: dense. RUR: tokens that are not repeated",
        )
        _legend(figure, methods)
        save(figure, path)


def _against_size(
    ax: Axes,
    f: Findings,
    methods: Sequence[Method],
    value: Callable[[Seen], np.ndarray],
) -> None:
    sizes = f.experiment.sizes
    if f.dense:
        ax.axhline(value(f.dense).mean(), color=INK, linewidth=1.2)
    drawn_any = False
    for method in methods:
        seen = {n: f.of(method, n) for n in sizes}
        have = [n for n in sizes if seen[n]]
        if not have:
            continue
        drawn_any, (colour, marker, dashes) = True, LOOK[method]
        means = {n: [float(np.nanmean(value(s))) for s in seen[n]] for n in have}
        if method in DRAWN:
            low, high = ([pick(means[n]) for n in have] for pick in (min, max))
            ax.fill_between(have, low, high, color=colour, alpha=0.22, linewidth=0)
            ax.plot(have, [np.mean(means[n]) for n in have], color=colour, linestyle=dashes, linewidth=1.6)
            continue
        ax.plot(
            have, [means[n][0] for n in have], color=colour, linestyle=dashes, marker=marker, linewidth=2, markersize=6
        )
        for n in have:
            values = value(seen[n][0])
            if len(values) > 1 and np.isfinite(values).all():
                ax.plot([n, n], interval(values), color=colour, linewidth=1.2, alpha=0.7)
    if not drawn_any:
        write_missing(ax, 0.5, 0.5, transform=ax.transAxes)
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45, ha="right", rotation_mode="anchor")
    ax.minorticks_off()
    ax.set_xlabel("Neurons taken away")
    grid_lines(ax)


def _legend(figure: Figure, methods: Sequence[Method]) -> None:
    lines = []
    for method in methods:
        colour, marker, dashes = LOOK[method]
        label, wide = f"{method}: {WORDS[method]}", 2 if marker else 5
        lines.append(
            Line2D([], [], color=colour, linestyle=dashes, marker=marker or "None", linewidth=wide, label=label)
        )
    columns = 1 if in_column() else 3
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=letters(11))


@drawn
def plot_layers(chosen: Mapping[Method, np.ndarray], layers: Sequence[str], neurons: int, path: Path) -> None:
    """`chosen`: ranking -> the layer of each of its first neurons, by its place among `layers`."""
    with mpl.rc_context(STYLE):
        figure = new_figure(rows=2 * len(chosen))
        grid = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (name, places) in zip(grid, chosen.items(), strict=True):
            counts = np.bincount(places, minlength=len(layers))
            ax.bar(range(len(layers)), counts, width=0.8, color=LOOK[name][0])
            ax.set_title(f"{name}: {WORDS[name]}", fontsize=11, fontweight="bold", loc="left", pad=4)
            ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            grid_lines(ax)
        grid[-1].set_xlabel("Layer, in forward order")
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        head(figure, f"Where the first {neurons:,} neurons of each ranking lie", "Neurons in a layer")
        save(figure, path)


@drawn
def plot_prompts(f: Findings, before: Seen, after: Seen, path: Path) -> None:
    """Every prompt's mean toxicity, dense and pruned, of the behaviour and of the neutral prompts."""
    names = f.experiment.judged()
    with mpl.rc_context(STYLE):
        rows, columns = (len(names), 1) if in_column() else (1, len(names))
        figure = new_figure(rows=3 * len(names))
        for ax, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=True):
            x, y = before.per_prompt(name, f.judge), after.per_prompt(name, f.judge)
            most = max(float(x.max()), float(y.max()), 1e-6) * 1.05
            ax.plot([0, most], [0, most], color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
            less = y < x
            ax.plot(x[less], y[less], "o", color=LOOK["lrp"][0], markersize=6, alpha=0.7)
            ax.plot(x[~less], y[~less], "x", color=MUTED, markersize=6)
            ax.set_xlim(-0.02 * most, most)
            ax.set_ylim(-0.02 * most, most)
            ax.set_xlabel("Dense")
            ax.set_ylabel(f"Without {after.neurons:,} neurons")
            counts = f"less {int(less.sum())}, more {int((y > x).sum())}, the same {int((y == x).sum())}"
            ax.set_title(f"{name}: {counts}", fontsize=12, fontweight="bold", loc="left", pad=8)
        words = f"Mean over each prompt's completions, by {f.judge}. Dots lie below the line: less toxic when pruned"
        head(figure, f"Every prompt before and after ({after.ranking.name if after.ranking else 'dense'})", words)
        save(figure, path)
