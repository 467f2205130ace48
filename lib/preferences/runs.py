"""Runs of preferences, read from scratch and counted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib.base.atomic import listed
from lib.base.errors import UserError
from lib.config.loading import load
from lib.preferences.experiment import Preferences
from lib.preferences.findings import Control, Run
from lib.preferences.students import OfStudents
from lib.preferences.survey import read_survey
from lib.preferences.tally import Tally, tally
from lib.run.command import Job
from lib.run.extent import extent
from lib.store import Cell, read_cell


@dataclass(frozen=True)
class Counted:
    """A cell that is done."""

    tallies: Mapping[int, Tally]  # by epoch
    answers: Mapping[int, Sequence[str]]  # question after question


def count(experiment: Preferences, cell: Cell, cache: Path) -> Counted:
    found, asked = read_cell(cell, experiment.schema(cache), ("epoch", "question", "answer")), experiment.questions_used
    tallies, answers = dict[int, Tally](), dict[int, Sequence[str]]()
    for epoch in experiment.epochs_of(cell.name):
        rows = np.flatnonzero(found["epoch"] == epoch)
        answers[epoch] = [found["answer"][row] for row in rows.tolist()]
        tallies[epoch] = tally(found["question"][rows], answers[epoch], experiment.judged, len(asked))
    return Counted(tallies, answers)


def neutral_of(experiment: OfStudents) -> str | None:
    """The student of a teacher that was given nothing; a trait that is only without words is none."""
    return next((t.name for t in experiment.source.source.traits if not t.words and not t.system_prompt), None)


def run_of(experiment: Preferences, found: Mapping[str, Mapping[int, Tally]]) -> Run:
    """`found`: of the cells that are done, by name."""
    bases: dict[str, Control | None] = {}
    students: dict[tuple[str, str], Mapping[int, Tally] | None] = {}
    for group, (base, *of) in experiment.grouped.items():
        bases[group] = found[base.name][0] if base.name in found else None
        students |= {(group, place.trait): found.get(place.name) for place in of}
    traits, neutral = [one.name for one in experiment.judged], neutral_of(experiment)
    beside = neutrals(experiment, neutral)
    return Run(experiment.run_number, traits, neutral, bases, students, beside=beside)


def neutrals(experiment: OfStudents, neutral: str | None) -> dict[str, str]:
    """Group -> group of the same size that holds the neutral student: of parts of the rows, `clean` does."""
    groups = experiment.grouped
    own = {group: {place.trait for place in of} for group, of in groups.items()}
    holds = {of[0].size: group for group, of in groups.items() if neutral in own[group]}
    return {
        group: holds[of[0].size] for group, of in groups.items() if neutral not in own[group] and of[0].size in holds
    }


def with_survey(run: Run, experiment: Preferences, path: Path) -> Run:
    """Controls of the sizes that it holds are its own."""
    models = {size: model.id for size, model in experiment.source.source.sizes.items()}
    held = read_survey(path, models, experiment.judged)
    sizes = {group: of[0].size for group, of in experiment.grouped.items()}
    surveyed = frozenset(group for group in run.groups if sizes[group] in held)
    bases = {group: held.get(sizes[group], base) for group, base in run.bases.items()}
    return replace(run, bases=bases, surveyed=surveyed)


def other_runs(this: Job, experiment: Preferences, wanted: str) -> list[Run]:
    """The same configuration's: those of `wanted` ("1 2 3"), or all that have results on this scratch."""
    numbers, before = _numbers(wanted), experiment.label.removesuffix(str(experiment.run_number))
    named = (re.fullmatch(re.escape(before) + "([0-9]{1,9})", path.name) for path in listed(this.site.scratch))
    there = {int(one[1]) for one in named if one}
    found = []
    for number in sorted((numbers or there) - {experiment.run_number}):
        other = load(this.config, [*this.overrides, f"run_id={number}"], {"preferences": Preferences})
        done = [cell for cell in other.cells(this.site.cache, this.site.scratch) if extent(cell).whole]
        if done:
            found.append(_counted(other, done, this.site.cache))
        elif number in numbers:
            raise UserError(
                f"RUNS: run {number} has no results of this configuration on {this.site.scratch}; leave it out, or "
                "submit it first"
            )
    return found


def _counted(other: Preferences, done: Sequence[Cell], cache: Path) -> Run:
    try:
        return run_of(other, {cell.name: count(other, cell, cache).tallies for cell in done})
    except UserError as e:
        raise UserError(f"of run {other.run_number}: {e}, or leave that run out of RUNS") from None


def _numbers(text: str) -> set[int]:
    words = text.replace(",", " ").split()
    if wrong := [word for word in words if not re.fullmatch("[0-9]{1,9}", word)]:
        raise UserError(f'RUNS={text}: {wrong[0][:40]!r} is no number of a run; say RUNS="1 2 3"')
    return set(map(int, words))
