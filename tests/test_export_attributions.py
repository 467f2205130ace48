"""The export of attributions: merged scores, Wanda's, table and pictures against plain numpy over made-up shards."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from tools import forked, python, tiny_llama

from lib.attribution.experiment import Attribution
from lib.attribution.export import EXPLAINED
from lib.families import load
from lib.inputs.fetch import _model
from lib.inputs.records import save_model
from lib.inputs.samples import Rows, save_samples
from lib.store import commit

SETS = {"general-0": 9, "general-1": 9, "toxic": 6}  # name -> samples
BLOCK = 4


def config(folder: Path, level: str, score: str = "") -> Path:
    path = folder / f"{level}.yaml"
    path.write_text(
        f"kind: attribution\nname: {level}\nmodel: {{id: {folder}/model, dtype: float32}}\n"
        f"data:\n  general: {{id: {folder}/c4, seeds: [0, 1], samples: 9, tokens: 16}}\n"
        f"  prompts: {{toxic: {{id: {folder}/prompts, samples: 6}}}}\n"
        f"score: {{level: {level}, layers: [up_proj, down_proj], wanda: true, block: {BLOCK}{score}}}\n"
        "run: {shard_rows: 4, gpus: 0}\n"
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and sets that are prepared, without the texts that they would be made from."""
    here = tmp_path_factory.mktemp("export")
    tiny_llama(here / "model")
    config(here, "neuron")
    config(here, "weight", ", store: bfloat16")
    experiment = load(here / "neuron.yaml")
    save_model(here / "cache", _model(experiment.model, here / "cache", False))
    rng = np.random.default_rng(0)
    for name, count in SETS.items():
        rows = Rows()
        for i in range(count):
            rows.ids.append(rng.integers(3, 90, 16 if name.startswith("general") else 5 + i).tolist())
            rows.source.append(str(i))
            rows.text_sha256.append("0" * 64)
            rows.held_out.append(False)
        digest = experiment.data.digest(here / "cache", experiment.model, name)
        source = experiment.data.sets()[name][0].id
        save_samples(here / "cache", name, digest, rows, source=source, commit="0" * 40, attributes={})
    return here


def table_of(experiment: Attribution, folder: Path, name: str) -> dict[str, np.ndarray]:
    """Columns of all rows of a cell, made up: as the schema says, and of the counts that the samples have."""
    rng, schema = np.random.default_rng(list(name.encode())), experiment.schema(folder / "cache")
    cell = next(c for c in experiment.cells(folder / "cache", folder / "scratch") if c.name == name)
    lengths = np.array([16 if name.startswith("general") else 5 + i for i in range(SETS[name])])
    columns = {key: rng.standard_normal((cell.rows, *column.shape)) for key, column in schema.items()}
    columns = {key: np.abs(v) if key.startswith(("abs", "sumsq")) else v for key, v in columns.items()}
    columns["nonfinite"][:], columns["tokens"] = 0, lengths
    if "samples" in columns:
        parts = [lengths[i : i + BLOCK] for i in range(0, len(lengths), BLOCK)]
        columns["samples"] = np.array([len(part) for part in parts])
        columns["tokens"] = np.array([part.sum() for part in parts])
        for row, part in enumerate(parts):
            columns["logit"][row, len(part) :] = np.nan
    return {key: columns[key].astype(np.float32 if c.raw else c.stored) for key, c in schema.items()}


def fill(experiment: Attribution, folder: Path, *names: str) -> dict[str, dict[str, np.ndarray]]:
    """Shards of some cells; what is in them."""
    cache, schema, found = folder / "cache", experiment.schema(folder / "cache"), {}
    step = 1 if experiment.score.level == "weight" else 4
    for cell in experiment.cells(cache, folder / "scratch"):
        if cell.name in names:
            found[cell.name] = table_of(experiment, folder, cell.name)
            for a in range(0, cell.rows, step):
                columns = {k: v[a : a + step] for k, v in found[cell.name].items()}
                commit(cell.path, cell.digest, a, min(a + step, cell.rows), schema, columns, seconds=1.0)
    return found


def export(folder: Path, level: str, figures: str = "png"):
    env = {"SUITE_SCRATCH": "scratch", "SUITE_CACHE": "cache", "SUITE_OUTPUT": "out"}
    env = {k: str(folder / v) for k, v in env.items()} | {"SUITE_SITE": "local", "OMP_NUM_THREADS": "1"}
    env["SUITE_FIGURES"] = figures
    return forked("jobs.export_attributions", "--config", str(folder / f"{level}.yaml"), env=env)


@pytest.fixture(scope="module")
def neuron(folder):
    """The export of a neuron-level experiment: first with a set missing, then whole."""
    experiment = load(folder / "neuron.yaml")
    given = fill(experiment, folder, "general-0", "toxic")
    first = export(folder, "neuron", "png svg pdf")
    files = {p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*") if p.is_file()}
    table = (folder / "out/neuron/attribution_table.txt").read_text()
    given |= fill(experiment, folder, "general-1")
    second = export(folder, "neuron")
    return experiment, given, (first, files, table), second


def test_a_missing_set_is_named_and_the_others_are_exported(neuron):
    first, files, table = neuron[2]
    assert first.returncode == 2 and "1 of 3 cells are not done and not exported: general-1" in first.stderr
    assert len(first.stderr.strip().splitlines()) == 1 and "make resume" in first.stderr
    names = ("relevance_by_layer", "stability", "general_against_toxic")
    pictures = {f"{name}.{form}" for name in names for form in ("png", "svg", "pdf")}
    wanted = {"attribution_table.txt", "provenance.json", "general-0/scores.h5", "toxic/scores.h5", *pictures}
    assert files == {f"neuron/{name}" for name in wanted}
    assert next(line for line in table.splitlines() if line.startswith("general-1")).split()[-1] == "missing"


def test_scores_are_means_over_samples_layer_by_layer(folder, neuron):
    experiment, given, _, second = neuron
    assert second.returncode == 0 and not second.stderr, second.stderr
    parts = experiment.layout(folder / "cache")
    assert [p.outputs for p in parts] == [80, 48] * 3
    for name in SETS:
        with h5py.File(folder / "out/neuron" / name / "scores.h5") as f:
            assert f.attrs["samples"] == SETS[name] and f.attrs["tokens"] == given[name]["tokens"].sum()
            for key in ("tokens", "target", "logit", "nonfinite"):
                np.testing.assert_array_equal(f[key][:], given[name][key])
            for part in parts:
                for kind in ("signed", "abs"):
                    want = given[name][kind][:, part.first : part.first + part.outputs].astype(np.float64).mean(0)
                    np.testing.assert_array_equal(f[f"{part.name}/{kind}_mean"][:], want.astype(np.float32))


def test_wanda_is_weight_times_rms_summed_over_inputs(folder, neuron):
    from safetensors.numpy import load_file

    experiment, given = neuron[:2]
    weights = load_file(folder / "model/model.safetensors")
    at = 0
    for part in experiment.layout(folder / "cache"):
        weight = np.abs(weights[f"model.{part.name}.weight"].astype(np.float64))
        for name in SETS:
            sums = given[name]["sumsq"][:, at : at + part.inputs].astype(np.float64).sum(0)
            want = weight @ np.sqrt(sums / given[name]["tokens"].sum())
            with h5py.File(folder / "out/neuron" / name / "scores.h5") as f:
                np.testing.assert_allclose(f[f"{part.name}/wanda"][:], want, rtol=1e-5)
        at += part.inputs


def test_the_table_says_what_the_numbers_are(folder, neuron):
    experiment, given = neuron[:2]
    lines = (folder / "out/neuron/attribution_table.txt").read_text().splitlines()
    parts = experiment.layout(folder / "cache")
    for line, (name, count) in zip(lines[1:], SETS.items(), strict=False):
        data = given[name]
        sums = [data[kind].astype(np.float64).sum(1).mean() for kind in ("signed", "abs")]
        want = [name, str(count), str(data["tokens"].sum()), f"{data['logit'].mean(dtype=np.float64):.4f}"]
        assert line.split() == [*want, *(f"{s:+.6g}" for s in sums), "0"]
    assert f"Explained: {EXPLAINED['last']}." in lines
    by_layer = lines[lines.index(next(line for line in lines if line.startswith("signed "))) + 1 :]
    for line, part in zip(by_layer, parts, strict=False):
        values = [
            d["signed"][:, part.first : part.first + part.outputs].astype(np.float64).sum(1).mean()
            for d in (given[n] for n in SETS)
        ]
        assert line.split() == [part.name, *(f"{v:+.6g}" for v in values)]
    top = lines[lines.index("toxic: highest mean signed") + 1]
    mean = given["toxic"]["signed"].astype(np.float64).mean(0)
    best = int(mean.argmax())
    part = next(p for p in parts if p.first <= best < p.first + p.outputs)
    assert top.split() == [f"{part.name}[{best - part.first}]", f"{mean[best]:+.4g}"]


def test_provenance_vouches_for_what_was_written(folder, neuron):
    import hashlib

    raw = json.loads((folder / "out/neuron/provenance.json").read_text())
    cells = {c.name: c for c in neuron[0].cells(folder / "cache", folder / "scratch")}
    assert list(raw["sets"]) == sorted(SETS) and raw["experiment"]["score"]["rule"] == "attnlrp"
    assert raw["inputs"].keys() == {"model", *SETS}
    for name, about in raw["sets"].items():
        samples = next((folder / "cache/inputs/samples").glob(f"{name}-????????????/samples.h5"))
        assert raw["inputs"][name] == hashlib.sha256(samples.read_bytes()).hexdigest()
        assert about["digest"] == cells[name].digest and about["rounding"] is None
        assert about["sha256"] == hashlib.sha256((folder / f"out/neuron/{name}/scores.h5").read_bytes()).hexdigest()
        assert about["merged_sha256"] == hashlib.sha256((cells[name].path / "merged.h5").read_bytes()).hexdigest()


def test_results_of_other_settings_are_kept(folder, neuron):
    """The digest of one set is another's in what was written before."""
    record = folder / "out/neuron/provenance.json"
    before = (folder / "out/neuron/toxic/scores.h5").read_bytes()
    raw = json.loads(record.read_text())
    raw["sets"]["toxic"]["digest"] = "12345678" + "0" * 56
    record.write_text(json.dumps(raw))
    done = export(folder, "neuron")
    assert done.returncode == 0 and "kept as scores.h5.12345678" in done.stderr
    assert (folder / "out/neuron/toxic/scores.h5.12345678").read_bytes() == before
    assert (folder / "out/neuron/toxic/scores.h5").read_bytes() == before
    assert not (folder / "out/neuron/general-0/scores.h5.12345678").exists()


def test_weight_level_has_totals_by_layer_and_no_picture_of_neurons(folder):
    from lib.store.bf16 import from_bfloat16, to_bfloat16

    experiment = load(folder / "weight.yaml")
    given = fill(experiment, folder, *SETS)
    done = export(folder, "weight")
    assert done.returncode == 0, done.stderr
    out, parts = folder / "out/weight", experiment.layout(folder / "cache")
    assert {p.name for p in out.glob("*.png")} == {"relevance_by_layer.png"}
    text = (out / "attribution_table.txt").read_text()
    lines = text.splitlines()
    for line, (name, count) in zip(lines[1:], SETS.items(), strict=False):
        logit = given[name]["logit"]
        mean = logit[np.isfinite(logit)].mean(dtype=np.float64)
        assert np.isfinite(logit).sum() == count and line.split()[:4] == [
            name,
            str(count),
            str(given[name]["tokens"].sum()),
            f"{mean:.4f}",
        ]
    for kind in ("signed", "abs"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{kind} "))
        for line, part in zip(lines[at + 1 :], parts, strict=False):
            found = [float(v) for v in line.split()[1:]]
            blocks = [from_bfloat16(to_bfloat16(given[n][f"{kind}/{part.name}"])) for n in SETS]
            want = [b.astype(np.float64).sum() / SETS[n] for b, n in zip(blocks, SETS, strict=True)]
            assert line.split()[0] == part.name
            np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-5)
    assert "Blocks were stored in bfloat16: a value moved by at most 0.38" in text
    raw = json.loads((out / "provenance.json").read_text())
    assert 0 < raw["sets"]["toxic"]["rounding"][1] < raw["sets"]["toxic"]["rounding"][0] <= 1 / 257
    with h5py.File(out / "toxic/scores.h5") as f:
        assert f["samples"][:].tolist() == [4, 2] and f[f"{parts[0].name}/wanda"].shape == (parts[0].outputs,)


def test_another_kind_of_experiment_is_told_its_own_command(folder):
    done = python("-m", "jobs.export_attributions", "--config", "configs/demo_lls.yaml", env={"SUITE_SITE": "local"})
    assert done.returncode == 2 and "make export-lls" in done.stderr
