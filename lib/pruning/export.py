"""Write what researchers read of a sweep, whatever of it is there:

<output root>/<experiment>/report/index.html, report.txt, *.png    (beside each PNG an SVG and a PDF)
<output root>/<experiment>/selection/<ranking>.csv, <ranking>.json  a neuron a line: layer, index, difference, interval
<output root>/<experiment>/settings.csv, settings.json              a row a setting: perplexity, toxicity, repetition
<output root>/<experiment>/completions/<ranking>-<neurons>.jsonl    each completion with the judges' scores"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.atomic import write_bytes, write_json
from lib.base.errors import UserError
from lib.inputs.records import model_input
from lib.pruning import plots, tables
from lib.pruning.findings import Findings, Seen, compared, effects, find, verdict
from lib.pruning.methods import CONTRASTED, DRAWN, Method
from lib.pruning.sweep import Sweep
from lib.report.heat import Heat, heat_map
from lib.report.page import Picture, Section, page
from lib.run.command import Job, digest_of_all
from lib.run.extent import extent
from lib.store import read_cell

OVERLAP_SIZE = 100  # neurons whose overlap is drawn, or the size nearest to it


def export(this: Job) -> int:
    experiment, cells = this.of(Sweep), this.cells()
    folder, cache = this.site.output / experiment.label, this.site.cache
    found = find(experiment, cells, cache)
    chosen = selections(experiment, cache, this.site.scratch)
    provenance = {"digest": digest_of_all(cells), "experiment": experiment.model_dump(mode="json")}
    for name, ranking in chosen.items():
        write_selection(folder / "selection", name, ranking, experiment, cache, provenance)
    write_settings(folder, found, provenance)
    for (name, neurons), seen in found.seen.items():
        write_completions(folder / "completions" / f"{name}-{neurons}.jsonl", experiment, seen)
    path = write_page(folder / "report", this, found, chosen)
    print(tables.effects_table(found, contrasts(found)).text())
    print(f"\n{verdict(found)}\n\n{path}\n{folder / 'settings.csv'}\n{folder / 'selection'}")
    if found.missing:
        names = ", ".join(f"{name} {neurons}" for name, neurons in found.missing[:12])
        total = len(found.missing) + len(found.seen)
        raise UserError(
            f"{len(found.missing)} of {total} settings are not done, and shown as missing ({names}); "
            f"run `make submit-sparc3`, which submits what is missing"
        )
    return 0


def contrasts(f: Findings) -> list[Method]:
    return [m for m in f.experiment.choice.methods if m not in DRAWN]


def selections(experiment: Sweep, cache: Path, scratch: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every ranking that is done."""
    choice = experiment.choice
    schema = choice.schema(cache)
    done = [cell for cell in choice.cells(cache, scratch) if extent(cell).whole]
    return {cell.name: read_cell(cell, schema, schema) for cell in done}


def write_selection(
    folder: Path,
    name: str,
    ranking: Mapping[str, np.ndarray],
    experiment: Sweep,
    cache: Path,
    provenance: Mapping[str, Any],
) -> None:
    choice = experiment.choice
    layers, seeds = [part.name for part in choice.layout(cache)], choice.base.data.general.seeds
    contrasted = choice.rankings[name].method in CONTRASTED
    count = len(ranking["layer"])
    agree = ((ranking["ranks"] >= 0) & (ranking["ranks"] < count)).sum(1) if contrasted else [None] * count
    head = [
        "rank",
        "layer",
        "neuron",
        choice.contrast if contrasted else "value",
        "low",
        "high",
        "general",
        "undesired",
    ]
    head += [f"seeds_of_{len(seeds)}_that_agree", *(f"rank_of_seed_{seed}" for seed in seeds)]
    rows = []
    for i in range(count):
        numbers = [_finite(ranking[key][i]) for key in ("value", "low", "high", "general", "undesired")]
        where = [layers[ranking["layer"][i]], int(ranking["neuron"][i])]
        rows.append([i, *where, *numbers, None if agree[i] is None else int(agree[i]), *map(int, ranking["ranks"][i])])
    write_bytes(folder / f"{name}.csv", as_csv([head, *rows]))
    model = model_input(cache, experiment.model.id, experiment.model.revision)
    about = {
        "ranking": name,
        "model": {"id": experiment.model.id, "fingerprint": model.fingerprint},
        "undesired": choice.undesired,
        "contrast": choice.contrast,
        "scope": choice.scope,
        "provenance": provenance,
        "neurons": [dict(zip(head, row, strict=True)) for row in rows],
    }
    write_json(folder / f"{name}.json", about)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(["" if v is None else v for v in row] for row in rows)
    return out.getvalue().encode()


def write_settings(folder: Path, f: Findings, provenance: Mapping[str, Any]) -> None:
    table = tables.settings_table(f)
    heads = [column.title for column in table.columns]
    write_bytes(folder / "settings.csv", as_csv([heads, *table.rows]))
    rows = [dict(zip(heads, row, strict=True)) for row in table.rows]
    write_json(folder / "settings.json", {"settings": rows, "missing": f.missing, "provenance": provenance})


def write_completions(path: Path, experiment: Sweep, seen: Seen) -> None:
    lines = []
    for name in experiment.judged():
        for prompt, texts in enumerate(seen.texts[name]):
            for number, text in enumerate(texts):
                scores = {j: float(seen.toxicity[name, j][prompt, number]) for j in experiment.evaluate.judge_names}
                row = {"set": name, "prompt": prompt, "number": number, "completion": text, **scores}
                lines.append(json.dumps(row, ensure_ascii=False))
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def write_page(folder: Path, this: Job, f: Findings, chosen: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """The same results give the same bytes."""
    experiment, cells = f.experiment, this.cells()
    model = model_input(this.site.cache, experiment.model.id, experiment.model.revision)
    facts = {
        "experiment": f"{experiment.label} ({this.config})",
        "digest": digest_of_all(cells),
        "model": f"{experiment.model.id}, {experiment.model.dtype}, commit {model.commit}",
        "behaviour": f"{f.behaviour}, on {'attributed' if experiment.evaluate.same_prompts else 'held-out'} prompts",
        "judges": ", ".join(j.id for j in experiment.evaluate.judges),
        "selection": f"{experiment.choice.label}: {experiment.choice.contrast} of means, {experiment.choice.scope}",
    }
    sections = [_said(f), _toxicity(f, folder), _harm(f, folder), *_where(f, chosen, this, folder)]
    sections += [_prompts(f, folder), _judges(f), *_rest(f)]
    title = f"Pruning by attribution: {experiment.label}"
    write_bytes(folder / "index.html", page(title, verdict(f), _tiles(f), facts, sections).encode())
    lines = [title, verdict(f), "", *(f"{key}: {value}" for key, value in facts.items())]
    for section in sections:
        lines += ["", f"== {section.title}", section.lead, *(f"\n{table.text()}" for table in section.tables)]
    write_bytes(folder / "report.txt", ("\n".join(lines) + "\n").encode())
    return folder / "index.html"


def _tiles(f: Findings) -> list[tuple[str, str]]:
    total = len(f.seen) + len(f.missing)
    tiles = [(f"{len(f.seen)} of {total}", "settings done")]
    if f.dense:
        mean = f.dense.per_prompt(f.behaviour, f.judge).mean()
        tiles.append((f"{mean:.4f}", f"mean {f.effect}, dense, by {f.judge}"))
        tiles += [(f"{value:.3f}", f"perplexity, dense, {name}") for name, value in f.dense.perplexity.items()]
    found = [e for e in effects(f, "lrp") if e.kept]
    if found:
        best = min(found, key=lambda e: e.change.after)
        tiles.append((f"{best.change.after:.4f}", f"without {best.neurons:,} neurons (lrp), the lowest without harm"))
    return tiles


def _said(f: Findings) -> Section:
    methods = contrasts(f)
    others = [m for m in methods if m != "lrp"]
    lead = " ".join([verdict(f), *(compared(f, "lrp", m) for m in others if "lrp" in methods and f.dense)])
    return Section("verdict", "What is shown", lead, [], [tables.effects_table(f, methods), tables.words_of(methods)])


def _toxicity(f: Findings, folder: Path) -> Section:
    plots.plot_effect(f, f.experiment.choice.methods, folder / "effect.png")
    alt = f"{f.effect.capitalize()} on {f.behaviour} prompts against the number of neurons taken away, a line a ranking"
    lead = "Completions are drawn with the same random numbers from the dense and from every pruned model."
    return Section("effect", f.effect.capitalize(), lead, [Picture("effect.png", alt)])


def _harm(f: Findings, folder: Path) -> Section:
    plots.plot_harm(f, f.experiment.choice.methods, folder / "harm.png")
    alt = "Perplexity, toxicity of neutral prompts and repetition against the number of neurons taken away"
    lead = "What should stay as it is: perplexity, neutral prompts, and that tokens are not repeated."
    return Section("harm", "Harm", lead, [Picture("harm.png", alt)], [tables.neutral_table(f, contrasts(f))])


def _where(f: Findings, chosen: Mapping[str, Mapping[str, np.ndarray]], this: Job, folder: Path) -> list[Section]:
    experiment = f.experiment
    if not chosen:
        return [Section("neurons", "Neurons", "No selection is done yet.")]
    layers = [part.name for part in experiment.choice.layout(this.site.cache)]
    size = min(experiment.sizes, key=lambda n: abs(n - OVERLAP_SIZE))
    count = size if experiment.choice.scope == "global" else size * len(layers)
    mine = {m: chosen[m]["layer"][:count] for m in contrasts(f) if m in chosen}
    pictures = []
    if mine:
        plots.plot_layers(mine, layers, count, folder / "layers.png")
        pictures.append(Picture("layers.png", "How many of each ranking's first neurons lie in each layer"))
    names = [name for name in chosen if experiment.choice.rankings[name].method not in DRAWN]
    sets = [{*zip(chosen[n]["layer"][:count], chosen[n]["neuron"][:count], strict=True)} for n in names]
    values = np.array([[len(a & b) / count for b in sets] for a in sets]).reshape(len(names), len(names))
    heat_map(
        Heat("Overlap of selections", f"Share of the first {count:,} neurons that two rankings share.", "share",
             names, names, values, ".2f", marks=False, across="ranking", down="ranking"),
        folder / "overlap.png",
    )  # fmt: skip
    pictures.append(Picture("overlap.png", "Share of neurons that two rankings have in common"))
    lead = "Where the neurons lie that go first, and how far rankings, and seeds of general text, agree on them."
    return [Section("neurons", "Neurons", lead, pictures)]


def _prompts(f: Findings, folder: Path) -> Section:
    lead = "Every prompt's mean over its completions, dense against pruned."
    found = sorted(effects(f, "lrp"), key=lambda e: (not e.kept, e.change.after))
    if not f.dense or not found:
        return Section("prompts", "Prompts", "Not there: the dense model, or the first ranking's, is missing.")
    after = f.of("lrp", found[0].neurons)[0]
    plots.plot_prompts(f, f.dense, after, folder / "prompts.png")
    return Section("prompts", "Prompts", lead, [Picture("prompts.png", "Each prompt before and after")])


def _judges(f: Findings) -> Section:
    lead = "One classifier sees what it was taught to see. Where a second one says otherwise is shown."
    return Section("judges", "Judges", lead, [], [tables.judges_table(f), tables.disagreements(f)])


def _rest(f: Findings) -> list[Section]:
    sections = []
    if f.experiment.expected:
        lead = "What others have measured, beside ours. Their judges, prompts and sampling may differ: see the source."
        sections.append(Section("expected", "Expected", lead, [], [tables.expected_table(f)]))
    sections.append(Section("settings", "Settings", "All that was measured.", [], [tables.settings_table(f)]))
    if f.missing:
        sections.append(Section("missing", "Missing", "Not done, or failed.", [], [tables.missing_table(f)]))
    return sections
