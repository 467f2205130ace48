"""The report's figures, computed once, and its tables, which the page and the plain text render alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib.lls import analysis
from lib.lls.analysis import Contrast, Group, Separation
from lib.lls.matrix import Cell, Matrix, Measure, Noise
from lib.report.stats import maxima, mean_interval
from lib.report.tables import Column, Table, Value


@dataclass(frozen=True)
class Findings:
    matrix: Matrix
    measure: Measure
    scores: Mapping[Cell, np.ndarray]
    means: np.ndarray  # prompts x datasets
    normalised: np.ndarray  # the same, column by column
    separations: Sequence[Separation]
    pairs: np.ndarray  # AUC, owners x datasets
    contrasts: Mapping[str, Contrast]
    quintiles: Mapping[str, Sequence[Group]]  # of own cells
    noise: Mapping[Cell, Noise]

    def own(self, name: str) -> np.ndarray | None:
        """Scored rows of a dataset under its own prompt; None where there are none."""
        return self.of(name, name)

    def of(self, prompt: str, dataset: str) -> np.ndarray | None:
        good = analysis.finite(self.scores.get((prompt, dataset), np.empty(0)))
        return good if len(good) else None

    def others(self, prompt: str) -> np.ndarray | None:
        """Rows of the other owners' datasets under this prompt."""
        found = [v for d in self.matrix.owners if d != prompt and (v := self.of(prompt, d)) is not None]
        return np.concatenate(found) if found else None


def find(matrix: Matrix, measure: Measure, seed: int = 0, replicates: int = analysis.REPLICATES) -> Findings:
    scores = analysis.all_scores(matrix, measure)
    contrasts = {d: analysis.contrast(matrix, scores, d) for d in matrix.owners}
    noise = {cell: matrix.noise(*cell, measure) for cell in scores}
    means = analysis.mean_matrix(matrix, scores)
    owners = np.array([p in matrix.owners for p in matrix.prompts], bool)
    return Findings(
        matrix,
        measure,
        scores,
        means,
        analysis.column_normalised(means, owners),
        analysis.separations(matrix, scores, seed, replicates),
        analysis.auc_matrix(matrix, scores),
        {d: c for d, c in contrasts.items() if c is not None},
        {d: analysis.quintiles(scores[d, d]) for d in matrix.owners if (d, d) in scores},
        {cell: n for cell, n in noise.items() if n is not None},
    )


def _absent(f: Findings) -> str:
    """A neutral cell that is not done is missing; without a neutral dataset there is nothing to miss."""
    return "missing" if f.matrix.neutral in f.matrix.datasets else "-"


def own_table(f: Findings) -> Table:
    rows: list[list[Value]] = []
    for name in f.matrix.owners:
        own, others, neutral = f.own(name), f.others(name), f.of(name, f.matrix.neutral)
        if own is None:
            rows.append([name, None, None, None, None, None, None, None, None, None, None])
            continue
        sd = float(own.std(ddof=1)) if len(own) > 1 else None
        noise = f.noise.get((name, name))
        rows.append(
            [
                name,
                len(own),
                len(f.scores[name, name]) - len(own),
                float(own.mean()),
                mean_interval(own),
                sd,
                float((own > 0).mean()),
                None if others is None else float(others.mean()),
                None if neutral is None else float(neutral.mean()),
                noise.sd if noise else None,
                noise.sd / sd if noise and sd else None,
            ]
        )
    absent = _absent(f)
    columns = [
        Column("dataset"),
        Column("rows", ",d"),
        Column("no score", ",d"),
        Column("mean", "+.4f", "missing"),
        Column("95 % interval", "+.4f"),
        Column("sd", ".4f"),
        Column("> 0", ".1%"),
        Column("others' mean", "+.4f"),
        Column("neutral's mean", "+.4f", absent),
        Column("noise sd", ".4f"),
        Column("noise / sd", ".1%"),
    ]
    noise = "Noise sd: what the model's low precision adds to one row's score, from a sample of rows scored again."
    if not f.noise:
        noise = "The noise of the model's precision was not measured for this measure."
    note = f"Others and neutral: their rows under that same prompt. {noise}" if not f.matrix.diagonal else noise
    kept = [j for j, c in enumerate(columns) if c.absent != "-" or any(row[j] is not None for row in rows)]
    columns, rows = [columns[j] for j in kept], [[row[j] for j in kept] for row in rows]
    return Table("own", f"Each dataset under its own prompt ({f.measure.caption})", columns, rows, note)


def separation_table(f: Findings) -> Table:
    rows: list[list[Value]] = [[name, *[None] * 8] for name in f.matrix.owners]
    for s in f.separations:
        line: list[Value] = [s.prompt]
        for e in (s.others, s.neutral):
            line += [e.other, e.value, (e.low, e.high)] if e else [None, None, None]
        rows[f.matrix.owners.index(s.prompt)] = [*line, s.distance, s.above]
    columns = [
        Column("prompt"),
        Column("other rows", ",d"),
        Column("AUC, others", ".3f", "missing"),
        Column("95 % interval", ".3f"),
        Column("neutral rows", ",d"),
        Column("AUC, neutral", ".3f", _absent(f)),
        Column("95 % interval", ".3f"),
        Column("distance", "+.2f"),
        Column("above P95", ".1%"),
    ]
    note = (
        "AUC: how often an own row scores above one of the others, ties half; 0.5 is chance. Intervals: bootstrap over "
        "rows. Distance: own mean minus neutral mean in pooled standard deviations. Above P95: own rows above the "
        "neutral rows' 95th percentile."
    )
    return Table("separation", "Own rows against others under the same prompt", columns, rows, note)


def grid(name: str, title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, form: str) -> Table:
    """A matrix with its maxima marked: v = highest of its column, > = highest of its row."""
    by_row, by_column = maxima(values)
    marks: dict[tuple[int, int], str] = {}
    for j, i in enumerate(by_column):
        if i >= 0:
            marks[int(i), j + 1] = "v"
    for i, j in enumerate(by_row):
        if j >= 0:
            marks[i, int(j) + 1] = marks.get((i, int(j) + 1), "") + ">"
    heads = [Column("prompt"), *(Column(c, form, "missing") for c in columns)]
    lines = [[r, *(float(v) for v in line)] for r, line in zip(rows, values, strict=True)]
    note = "v: highest of its column. >: highest of its row."
    return Table(name, title, heads, lines, note if marks else "", marks)


def matrix_tables(f: Findings) -> list[Table]:
    m = f.matrix
    tables = [
        grid("means", "Mean LLS, prompt by dataset", m.prompts, m.datasets, f.means, "+.4f"),
    ]
    if np.isfinite(f.normalised).any():
        title = "Mean LLS in standard deviations of its column, over the animals' prompts"
        tables.append(grid("normalised", title, m.prompts, m.datasets, f.normalised, "+.2f"))
    return tables


def pairs_table(f: Findings) -> Table:
    rows: list[list[Value]] = []
    for prompt, line in zip(f.matrix.owners, f.pairs, strict=True):
        rows.append(
            [prompt, *("own" if d == prompt else float(v) for d, v in zip(f.matrix.datasets, line, strict=True))]
        )
    columns = [Column("prompt"), *(Column(d, ".3f", "missing") for d in f.matrix.datasets)]
    return Table("pairs", "AUC of a prompt's own rows against each dataset under that prompt", columns, rows)


def contrast_table(f: Findings) -> Table:
    rows: list[list[Value]] = []
    for name in f.matrix.owners:
        c = f.contrasts.get(name)
        good = analysis.finite(c.values) if c else np.empty(0)
        if c is None or not len(good):
            rows.append([name, *[None] * 6])
            continue
        mean, positive = float(good.mean()), float((good > 0).mean())
        rows.append([name, len(good), mean, mean_interval(good), positive, len(c.used), len(c.absent)])
    columns = [
        Column("dataset"),
        Column("rows", ",d"),
        Column("contrast", "+.4f", "missing"),
        Column("95 % interval", "+.4f"),
        Column("> 0", ".1%"),
        Column("other prompts", "d"),
        Column("not done", "d"),
    ]
    note = "A row's LLS under its own prompt minus its mean under the other animals' prompts."
    return Table("contrast", "Contrastive score", columns, rows, note)


def quintile_table(f: Findings) -> Table:
    rows: list[list[Value]] = []
    for name in f.matrix.owners:
        groups = f.quintiles.get(name) or []
        cells: list[Value] = [None, *[None] * 10] if len(groups) < 5 else [sum(g.n for g in groups)]
        for g in groups if len(groups) == 5 else ():
            cells += [g.mean, (g.low, g.high)]
        rows.append([name, *cells])
    columns = [Column("dataset"), Column("rows", ",d")]
    for i in range(1, 6):
        columns += [Column(f"Q{i} mean", "+.4f", "missing"), Column("lowest, highest", "+.4f")]
    note = "Rows of a dataset under its own prompt in ascending order, in five groups of equal size (to one row)."
    return Table("quintiles", "Quintiles", columns, rows, note)


def selection_table(records: Sequence[Mapping[str, Value]]) -> Table:
    rows: list[list[Value]] = [[r["file"], r["n"], r["by"], r["threshold"], str(r["sha256"])[:12]] for r in records]
    columns = [Column("file"), Column("rows", ",d"), Column("by"), Column("threshold", "+.4f"), Column("sha256")]
    note = "Each file has a .provenance.json beside it. Rows without a score are never chosen."
    return Table("selections", "Selections, ready to fine-tune on", columns, rows, note)
