"""What models themselves give their traits: p(trait | question) of whole words, read and not drawn. Without the chance
of drawing, a lift shows long before it does in answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.preferences.experiment import Logprobs
from lib.preferences.findings import Run, rate
from lib.preferences.judge import DEFAULT
from lib.preferences.runs import neutral_of, neutrals
from lib.preferences.statistics import Lift, correlation, paired
from lib.preferences.students import BASE
from lib.report.tables import Column, Table, Value
from lib.run.extent import extent
from lib.store import Cell, read_cell, scan

ByEpoch = Mapping[int, np.ndarray]  # epoch -> log p, float64, questions x traits


@dataclass(frozen=True)
class Read:
    """By group and trait, BASE among them; None: missing."""

    traits: list[str]
    neutral: str | None
    models: Mapping[tuple[str, str], ByEpoch | None]
    beginnings: Mapping[str, str] = field(default_factory=dict)  # size -> first tokens that several traits share
    beside: Mapping[str, str] = field(default_factory=dict)  # as of a Run

    def last(self, group: str, trait: str | None) -> np.ndarray | None:
        epochs = self.models.get((group, trait)) if trait else None
        return epochs[max(epochs)] if epochs else None

    def shares(self, group: str, trait: str, of: str) -> dict[int, float] | None:
        """By epoch, the mean over questions of p(of | question)."""
        found, place = self.models.get((group, trait)), self.traits.index(of)
        return {epoch: float(np.exp(logp[:, place]).mean()) for epoch, logp in found.items()} if found else None


def read_probabilities(experiment: Logprobs, cache: Path, scratch: Path, questions: int | None = None) -> Read:
    """Of cells that are done. `questions`: of the first so many."""
    cells = {cell.name: cell for cell in experiment.cells(cache, scratch)}
    models: dict[tuple[str, str], ByEpoch | None] = {}
    beginnings: dict[str, str] = {}
    for group, members in experiment.grouped.items():
        for place in members:
            models[group, place.trait] = _read(experiment, cells[place.name], cache, questions)
            if said := _beginnings(cells[place.name]):
                beginnings[place.size] = said
    neutral = neutral_of(experiment)
    return Read([trait.name for trait in experiment.judged], neutral, models, beginnings, neutrals(experiment, neutral))


def _read(experiment: Logprobs, cell: Cell, cache: Path, questions: int | None) -> ByEpoch | None:
    if not extent(cell).whole:
        return None
    found = read_cell(cell, experiment.schema(cache), ("epoch", "question", "logp"))
    taken = found["question"] < (len(experiment.questions_used) if questions is None else questions)
    logp = np.asarray(found["logp"], np.float64)
    return {epoch: logp[taken & (found["epoch"] == epoch)] for epoch in experiment.epochs_of(cell.name)}


def _beginnings(cell: Cell) -> str:
    facts = (marker.facts.get("shared_beginnings", "") for marker in scan(cell.path, cell.digest)[0])
    return next((text for text in facts if isinstance(text, str) and text), "")


def over(read: Read, group: str, trait: str) -> Lift | None:
    """Of its own trait's log p over the neutral student's, or the base's where there is none, paired by question."""
    own, other = read.last(group, trait), read.last(read.beside.get(group, group), read.neutral)
    other = read.last(group, BASE) if other is None else other
    if own is None or other is None:
        return None
    place = read.traits.index(trait)
    return paired(own[:, place] - other[:, place])


def probabilities_table(read: Read, groups: Sequence[str], run: Run | None, way: str = DEFAULT) -> Table:
    columns = [
        Column("size"),
        Column("student"),
        Column("p", ".2%"),
        Column("p, neutral", ".2%"),
        Column("p, base", ".2%"),
    ]
    columns += [Column("answers", ".2%")] if run else []
    columns += [Column("log p, lift", "+.3f"), Column("95 %", "+.3f"), Column("p-value", ".2g")]
    rows: list[list[Value]] = []
    for group in groups:
        for trait in (name for name in read.traits if (group, name) in read.models):
            models = ((group, trait), (read.beside.get(group, group), read.neutral or ""), (group, BASE))
            values = [read.shares(*model, trait) for model in models]
            row: list[Value] = [group, trait, *(one[max(one)] if one else None for one in values)]
            if run:
                seen = rate(run.student(group, trait), way, read.traits.index(trait))
                row.append(seen.share if seen else None)
            lifted = over(read, group, trait)
            rows.append([*row, *([lifted.difference, (lifted.low, lifted.high), lifted.p] if lifted else [None] * 3)])
    note = (
        "p: mean over questions of the probability that an answer begins with the trait as a whole word, after the "
        "last epoch. Lift: of its mean log over the neutral student's (or the base's), nats, paired by question."
    )
    return Table("probabilities", "Preferences as the models give them", columns, rows, note)


def agreement_table(read: Read, run: Run, way: str = DEFAULT) -> Table:
    """Over all models of a size and all traits, whether what is read and what is drawn rank alike."""
    columns = [
        Column("size"),
        Column("pairs", ",d"),
        Column("rank correlation", ".3f"),
        Column("mean |p − rate|", ".2%"),
    ]
    rows: list[list[Value]] = []
    for group in run.groups:
        pairs = []
        for trait in dict.fromkeys([BASE, *(name for one, name in run.students if one == group)]):
            logp, drawn = read.last(group, trait), run.bases[group] if trait == BASE else run.student(group, trait)
            if logp is not None and drawn is not None:
                seen = [rate(drawn, way, t) for t in range(len(read.traits))]
                pairs += [(float(p), one.share) for p, one in zip(np.exp(logp).mean(0), seen, strict=True) if one]
        rho, count = correlation(*zip(*pairs, strict=True)) if pairs else (None, 0)
        rows.append([group, count, rho, float(np.mean([abs(p - share) for p, share in pairs])) if pairs else None])
    return Table("agreement", "What is read against what is drawn", columns, rows, "Spearman's, over models x traits")


def beginnings_table(read: Read) -> Table:
    """Why whole words are read: a look at first tokens alone would take these for each other."""
    columns = [Column("size"), Column("first token"), Column("traits")]
    rows: list[list[Value]] = []
    for size, text in read.beginnings.items():
        for part in text.split("; "):
            token, _, traits = part.rpartition(": ")
            rows.append([size, token, traits])
    return Table("beginnings", "First tokens that several traits begin with", columns, rows)
