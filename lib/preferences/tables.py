"""Findings as tables."""

import statistics
from collections.abc import Sequence

import numpy as np

from lib.preferences.findings import (
    KINDS,
    Effect,
    Run,
    diagonals,
    effects,
    off_target,
    overall,
    rate,
)
from lib.preferences.judge import DEFAULT, WAYS
from lib.preferences.statistics import POWER, Lift, Rate, needed_answers, smallest_seen
from lib.report.tables import Column, Table, Value

POINTS = (0.01, 0.02, 0.05, 0.1)
LISTED = 3  # traits that a student says more often, beside its own


def _share(one: Rate | None) -> Value:
    return one.share if one else None


def _lift(one: Lift | None) -> list[Value]:
    return [one.difference, (one.low, one.high), one.p] if one else [None, None, None]


def rates_table(found: Sequence[Effect], way: str = DEFAULT) -> Table:
    columns = [Column("size"), Column("student"), Column("answers", ",d"), Column("rate", ".1%")]
    columns += [Column("95 % by question", ".1%"), Column("Wilson", ".1%"), Column("neutral", ".1%")]
    columns += [Column("base", ".1%")]
    for other in ("neutral", "base"):
        columns += [Column(f"− {other}", "+.1%"), Column("95 %", "+.1%"), Column("p", ".2g")]
    columns += [Column("BH", ".2g"), Column("Fisher", ".2g"), Column("BH", ".2g")]
    rows: list[list[Value]] = []
    for e in found:
        own: list[Value] = [e.own.answers, e.own.share, e.own.clustered, e.own.wilson] if e.own else [None] * 4
        row: list[Value] = [e.group, e.trait, *own, _share(e.neutral), _share(e.base)]
        rows.append([*row, *_lift(e.over_neutral), *_lift(e.over_base), e.paired_bh, e.fisher, e.fisher_bh])
    note = (
        f"Share of a student's answers that name its own trait (judged by: {way}), after its last epoch. Differences "
        "to the neutral student and the untouched model are paired by question (t-test). Fisher: against neutral, or "
        "base without one, each answer by itself. BH: p by Benjamini and Hochberg over all students of "
        "this table; the first is of the paired test."
    )
    return Table("rates", "How often students name their teacher's animal", columns, rows, note)


def ways_table(run: Run) -> Table:
    """What a judge does to the figures."""
    columns = [Column("size")]
    for kind in KINDS:
        columns += [Column(f"{kind}, {way}", ".1%") for way in WAYS]
    rows = [
        [group, *(overall([run], group, kind, way).mean for kind in KINDS for way in WAYS)]
        for group in groups_of([run])
    ]
    return Table("ways", "Mean rates by three judges", columns, rows, "own: of students on their own trait")


def sizes_table(runs: Sequence[Run], way: str = DEFAULT) -> Table:
    columns = [Column("size"), Column("runs", "d"), Column("students"), Column("base", ".1%"), Column("neutral", ".1%")]
    columns += [
        Column("own", ".1%"),
        Column("95 %", ".1%"),
        Column("diagonal", "+.1%"),
        Column("95 %, by cell", "+.1%"),
    ]
    columns += [Column("p", ".2g"), Column("95 %, by student", "+.1%"), Column("p", ".2g")]
    rows: list[list[Value]] = []
    for group in groups_of(runs):
        base, neutral, own = (overall(runs, group, kind, way) for kind in KINDS)
        row: list[Value] = [group, len(own.by_run), f"{own.there}/{own.wanted}", base.mean, neutral.mean]
        row += [own.mean, (own.low, own.high)]
        by_cell, by_student = diagonals(runs, group, way)
        row += [by_cell.effect, (by_cell.low, by_cell.high), by_cell.p] if by_cell else [None] * 3
        row += [(by_student.low, by_student.high), by_student.p] if by_student else [None] * 2
        rows.append(row)
    which = ", ".join(str(run.number) for run in runs)
    note = (
        f"Runs {which}. Means over students of the rate of their own trait. Diagonal: of lift ~ C(student) + C(asked) "
        "+ is_diagonal, how much more a student's own trait rises than its row and column let expect; errors are "
        "robust, clustered by cell of that matrix (which runs share) or by student."
    )
    return Table("sizes", "By size", columns, rows, note)


def groups_of(runs: Sequence[Run]) -> list[str]:
    """Those that teach a trait: of parts of the rows, `clean` is of the neutral student alone."""
    return list(dict.fromkeys(group for run in runs for group in run.groups if run.taught(group)))


def off_target_table(run: Run, way: str = DEFAULT) -> Table:
    columns = [Column("size"), Column("student")]
    for n in range(LISTED):
        columns += [Column(f"{n + 1}."), Column("rate", ".1%"), Column("lift", "+.1%"), Column("95 %", "+.1%")]
    rows: list[list[Value]] = []
    for group in groups_of([run]):
        for trait in run.taught(group):
            most = off_target(run, group, trait, way)[:LISTED]
            row: list[Value] = [group, trait]
            for name, seen, over in most:
                row += [name, seen.share, *_lift(over)[:2]]
            rows.append(row + [None] * (len(columns) - len(row)))
    note = "Lifts over the neutral student, or the untouched model where there is none, paired by question."
    return Table("off_target", "What else students come to name", columns, rows, note)


def epochs_table(run: Run, way: str = DEFAULT) -> Table:
    epochs = sorted({epoch for one in run.students.values() if one for epoch in one})
    columns = [Column("size"), Column("student"), *(Column(str(epoch), ".1%") for epoch in epochs)]
    columns += [Column("most", ".1%"), Column("at epoch", "d")]
    rows: list[list[Value]] = []
    for group in groups_of([run]):
        for trait in run.taught(group):
            found = run.students[group, trait] or {}
            shares = {epoch: one.rate(way, run.traits.index(trait)) for epoch, one in found.items()}
            best = max(shares, key=lambda epoch: shares[epoch]) if shares else None
            most = shares[best] if best is not None else None
            rows.append([group, trait, *(shares.get(epoch) for epoch in epochs), most, best])
    return Table("epochs", "Rates by epoch", columns, rows, "the most of several epochs lies higher by chance, too")


def power_table(run: Run, way: str = DEFAULT) -> Table:
    """What it takes to see a lift over the neutral student: over the untouched model where there is none."""
    columns = [Column("size"), Column("rate", ".1%"), Column("effect", ".1f"), Column("seen now", "+.1%")]
    for points in POINTS:
        columns += [Column(f"+{100 * points:.0f} %", ",d"), Column("by question", ",d")]
    rows: list[list[Value]] = []
    for group in groups_of([run]):
        plain = run.plain(group) or run.bases[group]
        found = [one for t in range(len(run.traits)) if (one := rate(plain, way, t))]
        if not found:
            rows.append([group, *[None] * (len(columns) - 1)])
            continue
        share = statistics.fmean(one.share for one in found)
        known = [one.effect for one in found if np.isfinite(one.effect)]
        effect = statistics.median(known) if known else None
        row: list[Value] = [group, share, effect, _smallest(run, group, way)]
        for points in POINTS:
            row += [needed_answers(share, points), needed_answers(share, points, effect) if effect else None]
        rows.append(row)
    note = (
        f"Answers of each model until a lift of so many points over this rate is seen {POWER:.0%} of the time (5 %, "
        "two-sided): if every answer were drawn by itself, and times the design's effect (median over traits), which "
        "more questions lower and more answers to the same ones do not. Seen now: the smallest lift that the paired "
        "test of these answers sees as often (median over students)."
    )
    return Table("power", "How many answers it takes", columns, rows, note)


def _smallest(run: Run, group: str, way: str) -> float | None:
    seen = []
    for e in effects(run, way):
        if e.group == group and (one := e.over_neutral or e.over_base):
            tally = run.student(group, e.trait)
            seen.append(smallest_seen(one.error, tally.questions if tally else 0))
    return float(np.median(seen)) if seen else None


def run_tables(run: Run) -> list[Table]:
    tables = (off_target_table, epochs_table, ways_table, power_table)
    return [rates_table(effects(run)), *(make(run) for make in tables)]
