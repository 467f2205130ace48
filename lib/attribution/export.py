"""Merge an attribution experiment's shards and write what researchers read: scores, a table, plots.

<output root>/<experiment>/<set>/scores.h5      a group a layer: means over samples; tokens, targets, logits a sample
<output root>/<experiment>/attribution_table.txt, relevance_by_layer.png, provenance.json
<output root>/<experiment>/stability.png, general_against_<behaviour>.png         (level neuron)
Beside each PNG an SVG and a PDF (lib.report.look).

Level weight: the sums themselves stay in <cell>/merged.h5 on scratch, 28 GB for an 8B; the table has their totals."""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.attribution.experiment import Attribution, Part
from lib.attribution.plots import WORDS, plot_by_layer, plot_difference, plot_stability
from lib.attribution.stability_panels import ABOUT, panels
from lib.attribution.summary import Layer, Summary, overview, table, together
from lib.attribution.weights import weights_of
from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.inputs.records import ModelInput, model_input
from lib.run.command import Job
from lib.run.results import all_done, merged_files
from lib.store import Cell, Column, read_array
from lib.store.columns import to_hdf5
from lib.store.merge import rounding_of

EXPLAINED = {
    "last": "the largest logit at the last position",
    "all": "the largest logit at every position, added up",
    "given": "the given tokens' logits at the last position",
}
NORM = "rms"  # the only one that can be compared between sets of other lengths


def export(this: Job) -> int:
    experiment = this.of(Attribution)
    folder, cells = this.site.output / experiment.label, this.cells()
    parts, schema = experiment.layout(this.site.cache), experiment.schema(this.site.cache)
    layers = [Layer(p.name, p.first, p.outputs) for p in parts]
    files = merged_files(this)
    done, merged = list(files), {cell.name: path for cell, path in files.items()}
    found = {name: summarise(path, name, layers) for name, path in merged.items()}
    model = model_input(this.site.cache, experiment.model.id, experiment.model.revision)
    if experiment.score.wanda and found:
        add_wanda(model, parts, merged, found)
    summaries = {c.name: found.get(c.name) for c in cells}
    before = (read_json(folder / "provenance.json") or {}).get("sets") or {}
    for cell in cells:
        keep_others(cell.digest, (before.get(cell.name) or {}).get("digest"), folder / cell.name / "scores.h5")
    about = {c.name: write_scores(c, schema, merged[c.name], found[c.name], layers, folder) for c in done}
    words = table(summaries, layers, EXPLAINED[experiment.score.target]) + rounding_words(about)
    write_bytes(folder / "attribution_table.txt", (words + "\n").encode())
    sets = {c.name: about.get(c.name) for c in cells}  # None: missing
    inputs = {"model": model.fingerprint, **{n: experiment.input_of(this.site.cache, n).sha256 for n in summaries}}
    settings = experiment.model_dump(mode="json")
    write_json(folder / "provenance.json", {"sets": sets, "inputs": inputs, "experiment": settings})
    print(overview(summaries))
    for path in [folder / "attribution_table.txt", *draw(merged, summaries, layers, folder)]:
        print(path)
    all_done(cells, done)
    return 0


def summarise(path: Path, name: str, layers: list[Layer]) -> Summary:
    """One cell in few numbers; arrays are read one at a time."""
    with h5py.File(path, "r", locking=False) as f:
        tokens, logit = f["tokens"][:], f["logit"][:] if "logit" in f else np.array([])
        samples = len(tokens)
        if "samples" in f:  # level weight: a row is a block, the last one may have fewer samples
            inside = np.arange(logit.shape[1] if logit.size else 0) < f["samples"][:][:, None]
            samples, logit = int(f["samples"][:].sum()), logit[inside] if logit.size else logit
        mean = float(logit.mean(dtype=np.float64)) if logit.size else float("nan")
        found = Summary(name, samples, int(tokens.sum()), mean, int(f["nonfinite"][:].sum()))
        for kind in ("signed", "abs"):
            if kind in f and isinstance(f[kind], h5py.Dataset):
                found.add(kind, f[kind][:], layers)
            elif kind in f:
                sums = [read_array(f[kind][layer.name]).sum(dtype=np.float64) for layer in layers]
                found.totals[kind] = np.array(sums) / samples
                found.halves[kind] = np.full(len(layers), np.nan)
    return found


def add_wanda(model: ModelInput, parts: list[Part], merged: dict[str, Path], summaries: dict[str, Summary]) -> None:
    """Wanda's neuron scores of every set; a weight is read once."""
    import torch

    from lib.attribution.wanda import neuron_scores, norms

    sumsq, found = {}, {name: [] for name in merged}
    for name, path in merged.items():
        with h5py.File(path, "r", locking=False) as f:
            sumsq[name] = torch.from_numpy(f["sumsq"][:].sum(0, dtype=np.float64))
    for part, weight in zip(parts, weights_of(model, parts), strict=True):
        for name, s in summaries.items():
            total = sumsq[name][part.first_input : part.first_input + part.inputs]
            found[name].append(neuron_scores(weight, norms(total, s.tokens, s.samples, NORM)).double().numpy())
    for name, scores in found.items():
        summaries[name].means["wanda"] = np.concatenate(scores)
        summaries[name].totals["wanda"] = np.array([score.sum() for score in scores])
        summaries[name].halves["wanda"] = np.full(len(parts), np.nan)


def write_scores(
    cell: Cell, schema: dict[str, Column], merged: Path, s: Summary, layers: list[Layer], folder: Path
) -> dict[str, Any]:
    """scores.h5 of a set, and what provenance.json says of it."""
    names = ("samples", "tokens", "target", "logit", "nonfinite")
    with h5py.File(merged, "r", locking=False) as f:
        columns = {name: f[name][:] for name in names if name in f}
    for layer in layers:
        for kind, values in s.means.items():
            name = "wanda" if kind == "wanda" else f"{kind}_mean"
            columns[f"{layer.name}/{name}"] = values[layer.block].astype(np.float32)
    shapes = {name: Column(values.dtype.name, shape=values.shape[1:]) for name, values in columns.items()}
    about = {"digest": cell.digest, "set": cell.name, "samples": s.samples, "tokens": s.tokens, "wanda_norm": NORM}
    data = to_hdf5(shapes, columns, about)
    write_bytes(folder / cell.name / "scores.h5", data)
    record = read_json(cell.path / "merged.json") or {}
    return {
        "digest": cell.digest,
        "rows": cell.rows,
        "samples": s.samples,
        "tokens": s.tokens,
        "sha256": hashlib.sha256(data).hexdigest(),
        "merged": str(merged),
        "merged_sha256": record.get("sha256"),
        "rounding": rounding_of(cell, schema),
    }


def rounding_words(about: dict[str, dict[str, Any]]) -> str:
    """What bfloat16 took from stored sums; nothing where they are float32."""
    found = [a["rounding"] for a in about.values() if a["rounding"]]
    if not found:
        return ""
    worst, l1 = (max(values) for values in zip(*found, strict=True))
    return (
        f"\n\nBlocks were stored in bfloat16: a value moved by at most {worst:.3%} of itself, "
        f"an array by at most {l1:.3%} of its sum of sizes."
    )


def draw(
    merged: dict[str, Path], summaries: dict[str, Summary | None], layers: list[Layer], folder: Path
) -> list[Path]:
    """Each picture for which there is something to show."""
    done = {name: s for name, s in summaries.items() if s}
    kind = next((k for k in ("signed", "abs") if any(k in s.totals for s in done.values())), None)
    if kind is None:
        return []
    paths = [folder / "relevance_by_layer.png"]
    plot_by_layer(summaries, layers, paths[0])
    if not all(kind in s.means for s in done.values()):
        return paths
    means = {name: s.means[kind] for name, s in done.items()}
    general = [name for name in means if name.startswith("general-")]
    behaviours = [name for name in means if name not in general]

    def scores(name: str) -> np.ndarray:
        with h5py.File(merged[name], "r", locking=False) as f:
            return f[kind][:]

    paths.append(folder / "stability.png")
    plot_stability(panels(general, behaviours, means, scores), list(summaries), f"{WORDS[kind]}. {ABOUT}", paths[-1])
    for behaviour in behaviours if general else ():
        paths.append(folder / f"general_against_{behaviour}.png")
        both = together([done[g].sampled(kind) for g in general]), done[behaviour].sampled(kind)
        plot_difference(*both, behaviour, kind, layers, paths[-1])
    return paths
