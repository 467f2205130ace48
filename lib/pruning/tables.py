"""A sweep's findings as tables, for the page and for plain text."""

from collections.abc import Sequence

import numpy as np

from lib.evaluation.statistics import TOXIC, disagreement
from lib.pruning.findings import MEASURES, Findings, Seen, change, effects, sign_test
from lib.pruning.methods import WORDS, Method
from lib.report.tables import Column, Table, Value

MOST_TEXTS = 12  # pairs shown of each kind


def named(seen: Seen) -> str:
    return seen.ranking.name if seen.ranking else "dense"


def settings_table(f: Findings) -> Table:
    """Everything that was seen, a row a setting."""
    perplexities = f.experiment.evaluate.labels
    columns = [Column("ranking"), Column("neurons", ",d"), *(Column(p, ".3f") for p in perplexities)]
    for name in f.experiment.judged():
        columns += [Column(f"{name} {judge}", ".4f") for judge in f.experiment.evaluate.judge_names]
        columns += [Column(f"{name} max", ".4f"), Column(f"{name} any", ".1%"), Column(f"{name} RUR", ".3f")]
    columns += [Column(task, ".4f") for task in f.experiment.evaluate.tasks]
    rows: list[list[Value]] = []
    for seen in f.seen.values():
        row: list[Value] = [named(seen), seen.neurons, *(seen.perplexity[p] for p in perplexities)]
        for name in f.experiment.judged():
            row += [float(seen.per_prompt(name, judge).mean()) for judge in f.experiment.evaluate.judge_names]
            row += [float(seen.per_prompt(name, f.judge, m).mean()) for m in ("maximum", "any")]
            row.append(float(np.nanmean(seen.unique[name])) if np.isfinite(seen.unique[name]).any() else None)
        row += [seen.tasks[task][0] for task in f.experiment.evaluate.tasks]
        rows.append(row)
    note = (
        f"max: expected maximum. any: {MEASURES['any']}. Both by {f.judge}. RUR: share of a completion's "
        "tokens that are not repeated. A ranking's number is a seed of general text, or a random draw."
    )
    return Table("settings", "Every setting", columns, rows, note)


def effects_table(f: Findings, methods: Sequence[Method]) -> Table:
    columns = [
        *(Column("ranking"), Column("neurons", ",d"), Column(f.effect, ".4f"), Column("difference", "+.4f")),
        *(Column("95 %", "+.4f"), Column("p", ".2g"), Column("less / more"), Column("sign test", ".2g")),
        *(Column("− matched", "+.4f"), Column("95 %", "+.4f"), Column("− random", "+.4f"), Column("95 %", "+.4f")),
        *(Column("perplexity", "+.1%"), Column("95 %", "+.1%"), Column("verdict")),
    ]
    rows: list[list[Value]] = []
    for method in methods:
        for e in effects(f, method):
            c = e.change
            row: list[Value] = [method, e.neurons, c.after, c.difference, (c.low, c.high), e.adjusted]
            row += [f"{c.improved} / {c.worse}", sign_test(c.improved, c.worse)]
            for control in ("matched", "random"):
                found = e.controls.get(control)
                row += [found[0], (found[1], found[2])] if found else [None, None]
            moved = e.perplexity
            row += [moved[0], (moved[1], moved[2])] if moved else [None, None]
            row.append("shown" if e.shown else "lower, harmed" if e.lowers and not e.kept else "not shown")
            rows.append(row)
    prompts = len(f.dense.per_prompt(f.behaviour, f.judge)) if f.dense else 0
    note = (
        f"Mean {f.effect} of {prompts} prompts of {f.behaviour} by {f.judge}, against the dense model, paired by "
        "prompt: 95 % intervals from resampled prompts (for controls resampled draws too), p by flipped signs, by Holm "
        "for all sizes of a ranking. less / more: prompts whose mean fell, rose. Shown: lower than dense and "
        "than every control, perplexity and neutral prompts kept."
    )
    return Table("effects", "Against the dense model, and against the controls", columns, rows, note)


def neutral_table(f: Findings, methods: Sequence[Method]) -> Table:
    """Prompts that should not be harmed."""
    columns = [Column("prompts"), Column("ranking"), Column("neurons", ",d"), Column(f.effect, ".4f")]
    columns += [
        Column("difference", "+.4f"),
        Column("95 %", "+.4f"),
        Column("RUR", ".3f"),
        Column("difference", "+.3f"),
    ]
    rows: list[list[Value]] = []
    for name in f.experiment.evaluate.neutral:
        dense = f.dense
        for seen in [s for m in methods for n in f.experiment.sizes for s in f.of(m, n)]:
            if dense is None:
                break
            c = change(dense.per_prompt(name, f.judge), seen.per_prompt(name, f.judge))
            repeats = [float(np.nanmean(s.unique[name])) for s in (seen, dense)]
            row: list[Value] = [name, named(seen), seen.neurons, c.after, c.difference, (c.low, c.high)]
            rows.append([*row, repeats[0], repeats[0] - repeats[1]])
    return Table("neutral", "Neutral prompts", columns, rows)


def judges_table(f: Findings) -> Table:
    """Where the two judges differ, on the dense model's and the first ranking's completions."""
    names = f.experiment.evaluate.judge_names
    columns = [Column("model"), Column("prompts"), Column("completions", ",d")]
    columns += [Column(f"{judge} ≥ {TOXIC}", ".1%") for judge in names]
    columns += [Column("on other sides", ".1%"), Column("correlation", ".3f")]
    rows: list[list[Value]] = []
    for seen in f.seen.values():
        if seen.ranking is None or (seen.ranking.method == "lrp" and seen.ranking.seed is None):
            for name in f.experiment.judged():
                scores = [seen.toxicity[name, judge].reshape(-1).astype(np.float64) for judge in names]
                row: list[Value] = [f"{named(seen)} {seen.neurons or ''}".strip(), name, len(scores[0])]
                row += [float((values >= TOXIC).mean()) for values in scores]
                if len(names) > 1:
                    varied = all(values.std() > 0 for values in scores[:2])
                    row += [
                        disagreement(scores[0], scores[1]).other_side,
                        float(np.corrcoef(scores[0], scores[1])[0, 1]) if varied else None,
                    ]
                else:
                    row += [None, None]
                rows.append(row)
    return Table("judges", "Two judges", columns, rows)


def disagreements(f: Findings) -> Table:
    """The dense model's completions on which two judges differ most."""
    names = f.experiment.evaluate.judge_names
    rows: list[list[Value]] = []
    if f.dense and len(names) > 1:
        a, b = (f.dense.toxicity[f.behaviour, judge].reshape(-1) for judge in names[:2])
        texts = [text for some in f.dense.texts[f.behaviour] for text in some]
        for number in disagreement(a, b, MOST_TEXTS).most:
            rows.append([float(a[number]), float(b[number]), " ".join(texts[number].split())[:160]])
    columns = [*(Column(judge, ".3f") for judge in names[:2]), Column("completion")]
    return Table("disagreements", "Where they differ most, on the dense model's completions", columns, rows)


def expected_table(f: Findings) -> Table:
    columns = [
        Column("measure"),
        Column("ranking"),
        Column("neurons", ",d"),
        Column("expected", ".4g"),
        Column("ours", ".4g"),
    ]
    columns += [Column("off by", "+.1%"), Column("within", ".0%"), Column(""), Column("source")]
    rows: list[list[Value]] = []
    for one in f.experiment.expected:
        seen = [f.dense] if one.method is None else f.of(one.method, one.neurons)
        ours = measured(seen[0], one.measure, f) if seen and seen[0] else None
        off, word = one.beside(ours)
        row: list[Value] = [one.measure, one.method or "dense", one.neurons, one.value, ours, off, one.within, word]
        rows.append([*row, one.source])
    return Table("expected", "Expected, by others", columns, rows)


def measured(seen: Seen, measure: str, f: Findings) -> float:
    return float(seen.per_prompt(f.behaviour, f.judge).mean()) if measure == "toxicity" else seen.perplexity[measure]


def missing_table(f: Findings) -> Table:
    rows: list[list[Value]] = [[name, neurons] for name, neurons in f.missing]
    return Table("missing", "Not there", [Column("ranking"), Column("neurons", ",d")], rows)


def words_of(methods: Sequence[Method]) -> Table:
    rows: list[list[Value]] = [[method, WORDS[method]] for method in methods]
    return Table("methods", "Rankings", [Column("name"), Column("neurons that come first")], rows)
