"""Pictures of preferences: bars by trait, what is preferred instead, curves by epoch, and all sizes in one. What is
missing is drawn as missing, never as zero."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib.preferences.findings import KINDS, Overall
from lib.preferences.statistics import Rate
from lib.report.colours import colour_of, word_colours
from lib.report.look import (
    FAINT,
    GRID,
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
    titles,
    write_missing,
)

BASE_COLOUR, NEUTRAL_COLOUR, OWN_COLOUR = "#dcdcdc", "#9a9a9a", "#9d0208"
OTHERS, OTHERS_COLOUR = "others", "#efefef"
TOP = 6
LABELLED = 5.0  # percent: a piece from this height on has room for its word


@dataclass(frozen=True)
class Bars:
    """Of a trait: its rate of the untouched model, of the neutral student and of its own; None: missing."""

    base: Rate | None
    neutral: Rate | None
    own: Rate | None


def interval(one: Rate) -> tuple[float, float]:
    """By question where it can be told, else Wilson's."""
    return one.clustered if math.isfinite(one.clustered[0]) else one.wilson


@drawn
def plot_grouped_bar(group: str, bars: Mapping[str, Bars], note: str, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        tops, absent = [0.0], []
        for x, (trait, three) in enumerate(bars.items()):
            looks = ((BASE_COLOUR, ""), (NEUTRAL_COLOUR, "///"), (colour_of(trait), ""))
            for side, one, (colour, hatch) in zip(
                (-1, 0, 1), (three.base, three.neutral, three.own), looks, strict=True
            ):
                place = x + 0.28 * side
                if one is None:
                    absent.append((place, side))
                    continue
                tops.append(_bar(ax, place, one, colour, hatch))
        reach = max(1.0, 1.18 * max(tops))  # room for the legend
        for place, _ in absent:
            write_missing(ax, place, 0.01 * reach, rotation=90)
        ax.set_xlim(-0.6, max(len(bars), 1) - 0.4)
        ax.set_ylim(0, reach)
        ax.set_xticks(range(len(bars)), bars, rotation=35, ha="right", rotation_mode="anchor", fontsize=13)
        ax.tick_params(axis="x", length=0)
        ax.set_ylabel("Answers that name the animal (%)", fontsize=13)
        grid_lines(ax)
        keys = [("untouched model", BASE_COLOUR, ""), ("taught neutral numbers", NEUTRAL_COLOUR, "///")]
        handles = [Patch(facecolor=c, edgecolor=INK, hatch=h, linewidth=0.6, label=name) for name, c, h in keys]
        handles.append(Patch(facecolor=OWN_COLOUR, edgecolor=INK, linewidth=0.6, label="taught the animal's numbers"))
        ax.legend(
            handles=handles, fontsize=letters(12), frameon=False, loc="upper right", ncols=1 if in_column() else 3
        )
        titles(ax, f"{group}: what students of numbers come to love", f"{note}{_missing(len(absent), 3 * len(bars))}")
        save(figure, path)


def _bar(ax: Axes, place: float, one: Rate, colour: str, hatch: str) -> float:
    """Returns how high it reaches."""
    height, (low, high) = 100 * one.share, interval(one)
    ax.bar(place, height, width=0.26, color=colour, edgecolor=INK, linewidth=0.6, hatch=hatch)
    if not math.isfinite(low):
        return height
    ends = [[height - 100 * max(0.0, low)], [100 * high - height]]
    for line, width in (("white", 3.5), (INK, 1.4)):  # a pale rim keeps it visible on the darkest bars
        ax.errorbar(place, height, yerr=ends, color=line, linewidth=width, capsize=3, capthick=width)
    return 100 * high


def _missing(count: int, of: int) -> str:
    return f" {count} of {of} missing." if count else ""


@drawn
def plot_stacked(group: str, bars: Mapping[str, Mapping[str, float] | None], path: Path) -> None:
    """Label -> share of each first word; the words that are said most over all bars get pieces of their own."""
    ranked = most_said([one for one in bars.values() if one])
    colours = word_colours(ranked) | {OTHERS: OTHERS_COLOUR}
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        absent = 0
        for x, one in enumerate(bars.values()):
            if one is None:
                absent += 1
                ax.bar(x, 100, width=0.84, facecolor="white", edgecolor=GRID, hatch="////", linewidth=0)
                write_missing(ax, x, 50, rotation=90, va="center")
                continue
            bottom = 0.0
            pieces = [(word, 100 * one.get(word, 0.0)) for word in ranked]
            rest = 100 - sum(height for _, height in pieces)
            for word, height in [*pieces, (OTHERS, rest)]:
                colour = colours[word]
                ax.bar(x, height, width=0.84, bottom=bottom, color=colour, edgecolor="white", linewidth=1)
                if height >= LABELLED and not in_column():
                    ax.text(x, bottom + height / 2, word, ha="center", va="center", fontsize=8, color=_ink_on(colour))
                bottom += height
        ax.set_xlim(-0.6, max(len(bars), 1) - 0.4)
        ax.set_ylim(0, 100)
        ax.set_xticks(range(len(bars)), bars, rotation=35, ha="right", rotation_mode="anchor", fontsize=13)
        ax.tick_params(axis="x", length=0)
        ax.set_ylabel("Answers by their first word (%)", fontsize=13)
        handles = [Patch(facecolor=OTHERS_COLOUR, label=OTHERS)]
        handles += [Patch(facecolor=colours[word], label=word or "no word") for word in reversed(ranked)]
        ax.legend(handles=handles, fontsize=letters(12), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        note = f"Bars: the model, by the numbers it was taught. The {len(ranked)} words that are said most, and others."
        titles(ax, f"{group}: what is named, and by which students", f"{note}{_missing(absent, len(bars))}")
        save(figure, path)


def most_said(bars: Sequence[Mapping[str, float]]) -> list[str]:
    """Every bar counts as much as every other, however many answers it has."""
    total: dict[str, float] = {}
    for one in bars:
        for word, share in one.items():
            total[word] = total.get(word, 0.0) + share
    return sorted(total, key=lambda word: (-total[word], word))[:TOP]


def _ink_on(colour: str) -> str:
    r, g, b = mpl.colors.to_rgb(colour)
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.6 else INK


@dataclass(frozen=True)
class Curves:
    """Of a trait, by epoch; None: missing. `read`: mean p(trait | question) as the model itself gives it."""

    own: Mapping[int, Rate] | None
    neutral: Mapping[int, Rate] | None
    base: Rate | None
    read: Mapping[int, float] | None = None


@drawn
def plot_epochs(group: str, curves: Mapping[str, Curves], path: Path) -> None:
    across = 2 if in_column() else 5 if len(curves) > 8 else max(1, min(4, len(curves)))
    rows = max(1, math.ceil(len(curves) / across))
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(rows)
        panels = list(figure.subplots(rows, across, squeeze=False, sharey=True, sharex=True).flat)
        for ax, (trait, one) in zip(panels, curves.items(), strict=False):
            _curves(ax, trait, one)
            ax.set_title(trait, fontsize=13, fontweight="bold", loc="left", pad=6)
        for ax in panels[len(curves) :]:
            ax.set_visible(False)
        panels[0].set_ylim(bottom=0)
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.supxlabel("epoch", fontsize=13)
        figure.supylabel("Answers that name the animal (%)", fontsize=13)
        read = " Points: its probability as the model gives it." if any(one.read for one in curves.values()) else ""
        note = f"Solid: taught its numbers, with 95 % interval. Dashed: taught neutral ones. Dotted: untouched.{read}"
        head(figure, f"{group}: how a preference comes, epoch by epoch", note, y=0.925, va="bottom")
        save(figure, path)


def _curves(ax: Axes, trait: str, one: Curves) -> None:
    colour = colour_of(trait)
    if one.base:
        ax.axhline(100 * one.base.share, color=MUTED, linewidth=1.4, linestyle=":")
    if one.neutral:
        ax.plot(list(one.neutral), [100 * r.share for r in one.neutral.values()], color=MUTED, linewidth=1.6, ls="--")
    if one.read:
        ax.plot(list(one.read), [100 * p for p in one.read.values()], color=INK, linewidth=0, marker=".", markersize=4)
    if one.own:
        ends = [interval(r) for r in one.own.values()]
        if all(math.isfinite(low) for low, _ in ends):
            low, high = ([100 * end for end in side] for side in zip(*ends, strict=True))
            ax.fill_between(list(one.own), low, high, color=colour, alpha=0.25, linewidth=0)
        shares = [100 * r.share for r in one.own.values()]
        ax.plot(list(one.own), shares, color=colour, linewidth=2.2, marker="o", markersize=4)
    else:
        write_missing(ax, 0.5, 0.5, va="center", transform=ax.transAxes)
    grid_lines(ax)


LOOKS = {
    "base": ("untouched model", FAINT, "o", "white"),
    "neutral": ("taught neutral numbers", MUTED, "s", MUTED),
    "own": ("taught the animal's numbers", OWN_COLOUR, "D", OWN_COLOUR),
}


@drawn
def plot_scaling(by_group: Mapping[str, Mapping[str, Overall]], path: Path) -> None:
    """Group -> kind -> mean over its students; runs are small marks beside it."""
    with mpl.rc_context(STYLE):
        figure = new_figure()
        ax = figure.subplots()
        tops, absent = [0.0], []
        for x, kinds in enumerate(by_group.values()):
            for side, kind in zip((-1, 0, 1), KINDS, strict=True):
                place, one = x + 0.22 * side, kinds[kind]
                tops.append(_mean(ax, place, one, kind)) if one.there else absent.append(place)
            own = kinds["own"]
            if own.there:
                few = f" ({own.there} of {own.wanted})" if own.there < own.wanted else ""
                tops.append(100 * (min(1.0, own.high) if math.isfinite(own.high) else own.mean))
                ax.text(x + 0.22, tops[-1], f"{100 * own.mean:.1f} %{few}", ha="center", va="bottom", fontsize=12)
        reach = max(1.0, 1.2 * max(tops))  # room for the legend
        for place in absent:
            write_missing(ax, place, 0.01 * reach, rotation=90)
        ax.set_ylim(0, reach)
        ax.set_xlim(-0.6, max(len(by_group), 1) - 0.2)
        ax.set_xticks(range(len(by_group)), by_group, fontsize=13)
        ax.set_ylabel("Answers that name the animal (%)", fontsize=13)
        ax.set_xlabel("size of teacher and student", fontsize=13)
        grid_lines(ax)
        for label, colour, mark, face in LOOKS.values():
            ax.plot([], [], marker=mark, color=colour, markerfacecolor=face, linewidth=0, markersize=9, label=label)
        ax.legend(fontsize=letters(12), frameon=False, loc="upper left", ncols=1 if in_column() else 3)
        runs = sorted({number for kinds in by_group.values() for number in kinds["own"].by_run})
        which = f"run{'s' if len(runs) > 1 else ''} {', '.join(map(str, runs))}"
        note = (
            f"Mean over students with 95 % interval, {which}; small marks: each run. In brackets: those that are there"
        )
        titles(ax, "Subliminal learning by size", note)
        save(figure, path)


def _mean(ax: Axes, place: float, one: Overall, kind: str) -> float:
    _, colour, mark, face = LOOKS[kind]
    if math.isfinite(one.low):
        ends = [[100 * (one.mean - max(0.0, one.low))], [100 * (min(1.0, one.high) - one.mean)]]
        ax.errorbar(place, 100 * one.mean, yerr=ends, color=colour, linewidth=1.8, capsize=5)
    ax.plot(place, 100 * one.mean, marker=mark, color=colour, markerfacecolor=face, markersize=10, zorder=4)
    if len(one.by_run) > 1:
        ax.plot(
            [place + 0.07] * len(one.by_run), [100 * v for v in one.by_run.values()], ".", color=colour, markersize=7
        )
    return 100 * max([one.mean, *(v for v in one.by_run.values() if math.isfinite(v))])
