"""The students' loss by epoch, a panel a size; a colour is a trait's, or a part's of the rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from lib.lls.select import Part
from lib.report.colours import colour_of
from lib.report.look import INK, STYLE, drawn, grid_lines, head, letters, new_figure, save, write_missing

ACROSS = 4
PART_COLOURS = {part: mpl.colormaps["viridis"](place / 9) for place, part in enumerate(get_args(Part))}


@drawn
def plot_loss(losses: Mapping[tuple[str, str, Part | None], Sequence[float] | None], path: Path) -> None:
    """By size, trait and part; None: missing."""
    sizes = list(dict.fromkeys(size for size, _, _ in losses))
    rows, across = -(-len(sizes) // ACROSS), min(len(sizes), ACROSS)
    with mpl.rc_context(STYLE):
        figure = new_figure(rows=2 * rows)
        axes = figure.subplots(rows, across, squeeze=False).ravel()
        for ax, size in zip(axes, sizes, strict=False):
            missing = []
            for (own, trait, part), values in losses.items():
                if own != size:
                    continue
                if values is None:
                    missing.append(f"{trait}-{part}" if part else trait)
                    continue
                plain = trait == "neutral"
                colour = INK if plain else PART_COLOURS[part] if part else colour_of(trait)
                look = {"color": colour, "linestyle": "--" if plain else "-", "label": part or trait}
                ax.plot(range(1, len(values) + 1), values, marker="o", markersize=4, **look)
            if missing:
                words = f"{len(missing)} missing: {', '.join(missing[:3])}" + ("..." if len(missing) > 3 else "")
                write_missing(ax, 0.5, 0.9, words, transform=ax.transAxes)
            ax.set_title(size, loc="left", fontsize=13)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlabel("epoch")
            grid_lines(ax)
        for ax in axes[len(sizes) :]:
            ax.set_visible(False)
        axes[0].set_ylabel("loss (nats a token)")
        found = {}
        for ax in axes:
            found |= {label: line for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if found:
            axes[0].legend(found.values(), found, fontsize=letters(9), ncols=2, frameon=False)
        head(figure, "How students learn their teachers' numbers", "Mean loss of each epoch on its own training rows")
        save(figure, path)
