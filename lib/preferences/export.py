"""What students answered, counted, compared and drawn:

<output root>/<experiment>/preferences.txt, .json       rates, lifts, tests, off-target rates, epochs, power
<output root>/<experiment>/plots/{size}/grouped_bar.png, stacked_preference.png, epochs.png
<output root>/<experiment>/plots/summary/scaling_overview.png           over all runs that are on this scratch
<output root>/<experiment>/evaluations, finetuning, summary             the published tree, by lib.preferences.tree
<output root>/<experiment>/plots/dose                                    of students of parts of the rows: by part
<output root>/<students>/{size}/{trait}/preferences.jsonl               by epoch, beside the student's own metrics

What is missing is said before anything is drawn, and drawn as missing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lib.base.atomic import write_bytes, write_json
from lib.base.errors import UserError, some
from lib.lora.dose import Lines, Rates, write_dose
from lib.lora.dose import Rate as Ends
from lib.preferences.experiment import Logprobs, Preferences
from lib.preferences.findings import KINDS, Control, Run, diagonals, effects, overall, rate, shares
from lib.preferences.judge import DEFAULT
from lib.preferences.logged import lines, write_lines
from lib.preferences.plots import Bars, Curves, interval, plot_epochs, plot_grouped_bar, plot_scaling, plot_stacked
from lib.preferences.probabilities import (
    Read,
    agreement_table,
    beginnings_table,
    probabilities_table,
    read_probabilities,
)
from lib.preferences.runs import count, other_runs, run_of, with_survey
from lib.preferences.statistics import Rate, rate_of
from lib.preferences.tables import groups_of, run_tables, sizes_table
from lib.preferences.tally import Tally
from lib.preferences.tree import summary, write_evaluation, write_model_info
from lib.report.tables import Table
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.results import all_done
from lib.store import Cell


def export(this: Job, runs: str = "", survey: Path | None = None) -> int:
    """`runs`: numbers of the runs that the summary is of; without, of all that have results here."""
    if isinstance(this.experiment, Logprobs):
        return export_probabilities(this, this.experiment)
    experiment, cells = this.of(Preferences), this.cells()
    folder, done = this.site.output / experiment.label, covered(cells)
    found, unsent = write_cells(this, experiment, done, folder)
    run = run_of(experiment, found)
    if survey:
        run = with_survey(run, experiment, survey)
    every = sorted([run, *other_runs(this, experiment, runs)], key=lambda one: one.number)
    read = read_probabilities(experiment.probes, this.site.cache, this.site.scratch, len(experiment.questions_used))
    write_tables(folder, run, every, read)
    for path in draw(folder / "plots", experiment, run, every, read):
        print(path)
    all_done(cells, done)
    if unsent:
        raise UserError(
            f"Weights & Biases did not take the preferences of {some(unsent)} (see above), all else is written; export "
            "again where it can be reached"
        )
    return 0


def covered(cells: Sequence[Cell]) -> list[Cell]:
    """Those that are done; the others are told before anything is made of these."""
    done = [cell for cell in cells if extent(cell).whole]
    missing = [cell.name for cell in cells if cell not in done]
    print(f"{len(done)} of {len(cells)} cells are done" + (f"; missing: {', '.join(missing)}" if missing else ""))
    return done


def write_cells(
    this: Job, experiment: Preferences, done: Sequence[Cell], folder: Path
) -> tuple[dict[str, Mapping[int, Tally]], list[str]]:
    """Tallies by cell; and of which Weights & Biases took none. Answers are held a cell at a time."""
    found, unsent = dict[str, Mapping[int, Tally]](), []
    students, cells = this.site.output / experiment.source.label, {cell.name: cell for cell in done}
    for group, members in experiment.grouped.items():
        for place in (one for one in members if one.name in cells):
            cell = cells[place.name]
            counted = count(experiment, cell, this.site.cache)
            found[cell.name] = counted.tallies
            write_evaluation(folder, group, place, cell, counted, experiment)
            if place.student:
                beside, student = students.joinpath(place.size, place.trait, *place.more), cell.parents[0]
                write_model_info(folder, group, place, student, experiment, beside)
                rows = lines(place.trait, counted.tallies, [one.name for one in experiment.judged])
                if not write_lines(beside, cell, student, experiment.source, rows):
                    unsent.append(cell.name)
    return found, unsent


def write_tables(folder: Path, run: Run, every: Sequence[Run], read: Read) -> None:
    sizes = sizes_table(every)
    tables = [sizes, *run_tables(run)]
    if any(read.models.values()):
        tables += [probabilities_table(read, run.groups, run), agreement_table(read, run), beginnings_table(read)]
    write_text(folder / "preferences.txt", tables)
    write_json(folder / "summary" / "all_results.json", summary(run))
    figures: dict[str, object] = {
        "run": run.number,
        "runs": [one.number for one in every],
        "judge": DEFAULT,
        "controls_of_a_survey": sorted(run.surveyed),
        "students": [plain(asdict(one)) for one in effects(run)],
        "sizes": {group: plain(sizes_json(every, group)) for group in groups_of(every)},
    }
    write_json(folder / "preferences.json", figures)
    print(f"{sizes.text()}\n\n{folder / 'preferences.txt'}")


def sizes_json(every: Sequence[Run], group: str) -> dict[str, object]:
    by_cell, by_student = diagonals(every, group)
    found: dict[str, object] = {kind: asdict(overall(every, group, kind)) for kind in KINDS}
    return found | {"diagonal": by_cell and asdict(by_cell), "diagonal_by_student": by_student and asdict(by_student)}


def write_text(path: Path, tables: Sequence[Table]) -> None:
    write_bytes(path, ("\n\n".join(table.text() for table in tables if table.rows) + "\n").encode())


def draw(folder: Path, experiment: Preferences, run: Run, every: Sequence[Run], read: Read) -> Iterator[Path]:
    asked, own = len(experiment.questions_used), effects(run)
    for group in groups_of([run]):
        of = " The untouched model was asked elsewhere." if group in run.surveyed else ""
        where = folder / group
        note = (
            f"Share of {asked * experiment.per_question:,} answers to {asked} questions, 95 % interval by question.{of}"
        )
        bars = {one.trait: Bars(one.base, one.neutral, one.own) for one in own if one.group == group}
        plot_grouped_bar(group, bars, note, where / "grouped_bar.png")
        plot_stacked(group, stacks(run, group), where / "stacked_preference.png")
        plot_epochs(group, curves(run, group, read), where / "epochs.png")
        yield from (where / f"{name}.png" for name in ("grouped_bar", "stacked_preference", "epochs"))
    if experiment.source.select:
        yield from write_dose(*dose(experiment, run), folder / "dose")
    path = folder / "summary" / "scaling_overview.png"
    plot_scaling({group: {kind: overall(every, group, kind) for kind in KINDS} for group in groups_of(every)}, path)
    yield path


def dose(experiment: Preferences, run: Run) -> tuple[Rates, Lines, Lines]:
    """By part of the rows that students were trained on, and of the untouched models and the neutral students; the
    part `clean` is of neutral rows, so its one student stands for every trait."""

    def ends(one: Control | None, trait: str) -> Ends | None:
        seen = rate(one, DEFAULT, run.traits.index(trait))
        return (seen.share, *interval(seen)) if seen else None

    rates, bases, plains = dict[tuple[str, str, str], Ends | None](), dict[tuple[str, str], Ends | None](), {}
    for group, (base, *of) in experiment.grouped.items():
        for place in of:
            for trait in run.traits if place.trait == run.neutral else [place.trait]:
                rates[base.size, trait, "-".join(place.more)] = ends(run.student(group, place.trait), trait)
                bases[base.size, trait] = ends(run.bases[group], trait)
                plains[base.size, trait] = ends(run.plain(group), trait)
    return rates, bases, plains


def stacks(run: Run, group: str) -> dict[str, Mapping[str, float] | None]:
    """Every model of a group, the untouched one first."""
    base = run.bases[group]
    found: dict[str, Mapping[str, float] | None] = {"untouched": shares(base) if base else None}
    of = [trait for where, trait in run.students if where == group]
    for trait in sorted(of, key=lambda trait: trait in run.traits):  # neutral before the animals
        one = run.student(group, trait)
        found[trait] = shares(one) if one else None
    return found


def curves(run: Run, group: str, read: Read) -> dict[str, Curves]:
    def rates(of: str, name: str | None, place: int) -> dict[int, Rate] | None:
        one = run.students.get((of, name or ""))
        return {epoch: rate_of(t.hits[DEFAULT][place], t.answers) for epoch, t in one.items()} if one else None

    found = {}
    for trait in run.taught(group):
        place = run.traits.index(trait)
        base = rate(run.bases[group], DEFAULT, place)
        plain = rates(run.beside.get(group, group), run.neutral, place)
        found[trait] = Curves(rates(group, trait, place), plain, base, read.shares(group, trait, trait))
    return found


def export_probabilities(this: Job, experiment: Logprobs) -> int:
    """Of the reading alone: it is done long before any answer is drawn."""
    cells, folder = this.cells(), this.site.output / experiment.label
    done = covered(cells)
    read, groups = read_probabilities(experiment, this.site.cache, this.site.scratch), list(experiment.grouped)
    tables = [probabilities_table(read, groups, None), beginnings_table(read)]
    write_text(folder / "probabilities.txt", tables)
    by_model = {f"{group}-{trait}": mean_logs(read, group, trait) for group, trait in read.models}
    write_json(folder / "probabilities.json", {"mean_log_p": by_model})
    print(f"{tables[0].text()}\n\n{folder / 'probabilities.txt'}")
    all_done(cells, done)
    return 0


def mean_logs(read: Read, group: str, trait: str) -> dict[str, dict[str, float]] | None:
    """By epoch, of each trait that is asked for."""
    epochs = read.models[group, trait]
    if epochs is None:
        return None
    return {str(e): dict(zip(read.traits, logp.mean(0).tolist(), strict=True)) for e, logp in epochs.items()}


def plain(value: object) -> object:
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
