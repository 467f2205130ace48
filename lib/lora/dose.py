"""The dose response: how often students of each part of their teacher's rows say the trait, from the rows that its
prompt makes least likely to those that it makes likeliest, beside the untouched model and the student of neutral rows.

Rates are handed in as plain numbers, each with the ends of its 95 % interval; None: not measured yet."""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from lib.base.atomic import write_bytes
from lib.lls.select import QUINTILES
from lib.report.colours import colour_of
from lib.report.look import (
    FAINT,
    INK,
    STYLE,
    drawn,
    grid_lines,
    head,
    in_column,
    leave_room,
    letters,
    new_figure,
    save,
    write_missing,
)
from lib.report.tables import Column, Table

Rate = tuple[float, float, float]  # itself, and the ends of its interval
Rates = Mapping[tuple[str, str, str], Rate | None]  # size, trait, part
Lines = Mapping[tuple[str, str], Rate | None]  # size, trait
ORDER = (*QUINTILES, "bottom", "top", "random", "clean")
CONTRASTS = (("q5", "q1"), ("top", "bottom"), ("random", "clean"))
LINES = {"base": (0, (1, 1.5)), "neutral": (0, (5, 2))}


def write_dose(rates: Rates, base: Lines, neutral: Lines, folder: Path) -> list[Path]:
    """dose.txt, and a picture a size. `base`, `neutral`: how often the untouched model and the student of all neutral
    rows say the trait."""
    tables = [rates_table(rates, base, neutral), contrasts_table(rates)]
    written = [folder / "dose.txt"]
    write_bytes(written[0], "\n\n".join(table.text() for table in tables).encode() + b"\n")
    for size in dict.fromkeys(size for size, _, _ in rates):
        written.append(folder / f"dose_{size}.png")
        plot_dose(size, rates, base, neutral, written[-1])
    return written


def traits_of(rates: Rates, size: str) -> list[str]:
    return list(dict.fromkeys(trait for own, trait, _ in rates if own == size))


def parts_of(rates: Rates) -> list[str]:
    """Those that any trait has, quintiles first, then others in the order of ORDER."""
    have = {part for _, _, part in rates}
    return [part for part in ORDER if part in have]


def rates_table(rates: Rates, base: Lines, neutral: Lines) -> Table:
    rows = []
    for size, trait in dict.fromkeys((size, trait) for size, trait, _ in rates):
        found = {part: rates[size, trait, part] for part in parts_of(rates) if (size, trait, part) in rates}
        lines = {"neutral": neutral.get((size, trait)), "base": base.get((size, trait))}
        for part, rate in (found | lines).items():
            rows.append((size, trait, part, rate and rate[0], rate and rate[1:]))
    columns = [Column("size"), Column("trait"), Column("trained on"), Column("says it", ".1%", "missing")]
    note = "neutral: the student of neutral rows; base: the untouched model"
    return Table("dose", "How often students say the trait", [*columns, Column("95 % interval", ".1%")], rows, note)


def contrasts_table(rates: Rates) -> Table:
    rows = []
    for size, trait in dict.fromkeys((size, trait) for size, trait, _ in rates):
        for high, low in CONTRASTS:
            if (size, trait, high) in rates and (size, trait, low) in rates:
                found = difference(rates[size, trait, high], rates[size, trait, low])
                rows.append((size, trait, f"{high} - {low}", found and found[0], found and found[1:]))
    columns = [Column("size"), Column("trait"), Column("parts"), Column("difference", "+.1%", "missing")]
    note = "of single students: the intervals are of their answers, and say nothing of another seed's students"
    return Table("contrasts", "What the dose changes", [*columns, Column("95 % interval", "+.1%")], rows, note)


def difference(a: Rate | None, b: Rate | None) -> Rate | None:
    """a - b, from the intervals of each by itself (Newcombe's tenth method, where these are Wilson's)."""
    if a is None or b is None:
        return None
    middle = a[0] - b[0]
    return middle, middle - math.hypot(a[0] - a[1], b[2] - b[0]), middle + math.hypot(a[2] - a[0], b[0] - b[1])


@drawn
def plot_dose(size: str, rates: Rates, base: Lines, neutral: Lines, path: Path) -> None:
    """A panel a trait."""
    traits, parts = traits_of(rates, size), parts_of(rates)
    across = min(len(traits), 2 if in_column() else 5 if len(traits) > 8 else 4 if len(traits) > 6 else 3)
    down = -(-len(traits) // across)
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(2 * down)
        panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
        for ax, trait in zip(panels, traits, strict=False):
            grid_lines(ax)
            lines = {"base": base.get((size, trait)), "neutral": neutral.get((size, trait))}
            for name, rate in lines.items():
                if rate:
                    ax.axhline(rate[0], color=INK, linewidth=1.2, linestyle=LINES[name], label=name, zorder=1)
                    ax.axhspan(rate[1], rate[2], color=FAINT, alpha=0.15, linewidth=0, zorder=0)
            _parts(ax, {part: rates[size, trait, part] for part in parts if (size, trait, part) in rates}, parts, trait)
            ax.set_title(trait, loc="left", fontsize=13, fontweight="bold", pad=6)
            ax.set_xticks(range(len(parts)), parts, rotation=90 if across > 2 or in_column() else 0, fontsize=11)
            ax.tick_params(axis="x", labelbottom=True, length=0)
        for ax in panels[len(traits) :]:
            ax.set_visible(False)
        drawn_here = [rate for of in (rates, base, neutral) for place, rate in of.items() if place[0] == size and rate]
        ends = [high for _, _, high in drawn_here]
        panels[0].set_xlim(-0.6, len(parts) - 0.4)
        highest = min(1.0, max([0.1, *ends]) * 1.08)
        panels[0].set_ylim(-0.03 * highest, 1.03 * highest)
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            panels[0].legend(handles, labels, fontsize=letters(10), frameon=False, loc="upper left")
        figure.supylabel("Answers that name the trait", fontsize=13)
        sub = "q1 to q5: fifths of the rows by LLS, the highest last. With 95 % intervals of the answers"
        head(figure, f"What students of {size} took from parts of their teachers' numbers", sub, y=0.925, va="bottom")
        leave_room(figure, 0.985)
        save(figure, path)


def _parts(ax: Axes, found: Mapping[str, Rate | None], parts: list[str], trait: str) -> None:
    """Quintiles are one line; the others stand by themselves."""
    colour = colour_of(trait)
    there = {part: rate for part, rate in found.items() if rate}
    line = {parts.index(part): rate[0] if rate else math.nan for part, rate in found.items() if part in QUINTILES}
    ax.plot(list(line), list(line.values()), color=colour, linewidth=2, zorder=2)  # broken where one is missing
    for part, (value, low, high) in there.items():
        x, how = parts.index(part), {"color": colour, "zorder": 3, "capsize": 4, "markersize": 7, "linewidth": 1.6}
        mark = "o" if part in QUINTILES else "D"
        face = colour if part in QUINTILES else "white"
        ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
        ax.errorbar(x, value, yerr=ends, fmt=mark, markerfacecolor=face, **how)
    for part in found.keys() - there.keys():
        write_missing(ax, parts.index(part), 0.03, rotation=90, transform=ax.get_xaxis_transform())
