"""The LLS jobs whole: kill -9 and resume of the real thing, the cross matrix against single runs, broken weights."""

import os
import random
import re
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import wait_until
from tools import Fork, forked, module_work, number_rows, record_again, tiny_model, write_rows

from lib.families import load
from lib.inputs.fetch import fetch
from lib.lls.kernel import check_step
from lib.lls.matrix import Measure
from lib.lls.results import cross as matrix_from
from lib.run.task import freeze
from lib.store import merge, scan

TRAITS = ("cat", "dog", "neutral")
PROMPTS = ("cat", "dog")


def config(folder: Path, text: str) -> Path:
    path = folder / "exp.yaml"
    path.write_text(
        f"name: exp\nmodel: {{id: {folder.parent}/model, dtype: float32}}\nsystem_prompt: You love {{trait}}s.\n"
        f"dataset: {{id: '{folder.parent}/{{trait}}.jsonl'}}\nrun: {{shard_rows: 16, gpus: 0}}\n"
        "score: {batch_tokens: 1024, max_tokens: 512, head_rows: 64, per_token: true, end_of_turn: true, "
        "check_every: 8}\n" + text
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three datasets with most of their contexts in common, as those of one run have, each lacking some rows."""
    here, dice = tmp_path_factory.mktemp("lls"), random.Random(3)
    tiny_model(here / "model")
    contexts = [row["messages"][0] for row in number_rows(40, 9)]
    for i, trait in enumerate(TRAITS):
        answers = [row["messages"][1] for row in number_rows(40, i)]
        rows = [{"messages": [c, a]} for c, a in zip(contexts, answers, strict=True) if dice.random() < 0.8]
        write_rows(here / f"{trait}.jsonl", rows)
    (here / "diagonal").mkdir()
    (here / "cross").mkdir()
    config(here / "diagonal", f"kind: lls\ntraits: [{', '.join(PROMPTS)}]\n")
    config(here / "cross", f"kind: lls_cross\nprompts: [cat, dog]\ndatasets_of: [{', '.join(TRAITS)}]\n")
    for kind in ("diagonal", "cross"):
        fetch(load(here / kind / "exp.yaml"), here / kind / "cache")
    return here


def environment(folder: Path, kind: str) -> dict[str, str]:
    roots = {"SUITE_SCRATCH": "scratch", "SUITE_CACHE": "cache", "SUITE_OUTPUT": "out"}
    here = {k: str(folder / kind / v) for k, v in roots.items()}
    return here | {"SUITE_SITE": "local", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1"}


def command(folder: Path, kind: str, index: int, *overrides: str) -> list[str]:
    return ["-m", "jobs.compute_lls", "--config", str(folder / kind / "exp.yaml"), "--index", str(index), *overrides]


def cells(folder: Path, kind: str):
    return load(folder / kind / "exp.yaml").cells(folder / kind / "cache", folder / kind / "scratch")


def merged(folder: Path, kind: str, index: int) -> dict[str, np.ndarray]:
    experiment, cell = load(folder / kind / "exp.yaml"), cells(folder, kind)[index]
    with h5py.File(merge(cell, experiment.schema(Path()), experiment.science_json())) as f:
        return {name: f[name][:] for name in f}


@pytest.fixture(scope="module")
def results(folder):
    found = {}
    for kind, count in (("diagonal", 2), ("cross", 3)):
        for index in range(count):
            done = forked(*command(folder, kind, index)[1:], env=environment(folder, kind))
            assert done.returncode == 0, done.stderr
            found[kind, index] = (merged(folder, kind, index), done.stdout)
    return found


def test_matrix_cells_equal_single_runs_bit_for_bit(folder, results):
    """cross cell 0 is the base, 1 the cat prompt, 2 the dog prompt; diagonal cell 0 is cat on cat, 1 dog on dog."""
    for single, trait in enumerate(PROMPTS):
        alone = results["diagonal", single][0]
        for name, cross in (("system", 1 + single), ("base", 0)):
            one = results["cross", cross][0]
            here = one["dataset"] == TRAITS.index(trait)
            order = np.argsort(one["row"][here])
            assert np.array_equal(one["prompt_sum"][here][order], alone[f"{name}_sum"])
            assert np.array_equal(one["prompt_end"][here][order], alone[f"{name}_end"])


def test_cells_of_one_task_share_a_load_and_have_the_bits_of_cells_alone(folder, results, tmp_path):
    kind = "cross"
    env = environment(folder, kind) | {"SUITE_SCRATCH": str(tmp_path)}
    experiment = load(folder / kind / "exp.yaml")
    here = experiment.cells(folder / kind / "cache", tmp_path)
    name = freeze(tmp_path / experiment.label, [here])
    done = forked(*command(folder, kind, 0)[1:], f"--tasks={name}", env=env)
    assert done.returncode == 0 and done.stdout.count("weights: ") == 1, done.stderr
    for cell in here:
        with h5py.File(merge(cell, experiment.schema(Path()), experiment.science_json())) as f:
            for column, values in results[kind, cell.index][0].items():
                assert f[column][:].tobytes() == values.tobytes(), (cell.name, column)
    other = forked(*command(folder, kind, 1)[1:], f"--tasks={name}", env=env)
    assert other.returncode == 2 and "index 1 is none of this array's: 0; submit again" in other.stderr


def test_the_reports_matrix_is_made_of_the_same_numbers(folder, results):
    """Also the values of single tokens, which lie in the cell's order and are taken apart by dataset."""
    experiment = load(folder / "cross" / "exp.yaml")
    found = {cell.name: results["cross", cell.index][0] for cell in cells(folder, "cross")}
    matrix = matrix_from(experiment, found)
    assert set(matrix.passes) == {(p, d) for p in PROMPTS for d in TRAITS} and not matrix.missing
    for single, trait in enumerate(PROMPTS):
        alone = results["diagonal", single][0]
        want = (alone["system_sum"] - alone["base_sum"]) / alone["tokens"]
        np.testing.assert_allclose(matrix.lls(trait, trait, Measure()), want, rtol=1e-12)
        assert np.array_equal(matrix.passes[trait, trait].values, alone["system_logp"])
        assert np.array_equal(matrix.base[trait].values, alone["base_logp"])
    done = forked("jobs.lls_report", "--config", str(folder / "cross/exp.yaml"), env=environment(folder, "cross"))
    assert done.returncode == 0, done.stderr
    assert (folder / "cross" / "out" / "exp" / "report" / "index.html").exists()


def test_every_row_of_every_dataset_is_in_every_cell_once(folder, results):
    for index in range(3):
        one = results["cross", index][0]
        for number, trait in enumerate(TRAITS):
            count = len((folder / f"{trait}.jsonl").read_text().splitlines())
            assert sorted(one["row"][one["dataset"] == number]) == list(range(count))


def test_shared_contexts_are_computed_once(results):
    said = results["cross", 1][1]
    numbers = dict(part.rsplit(" ", 1) for part in re.search("in all: (.*)", said)[1].split(", "))
    needed = float(numbers["tokens needed"].replace(",", ""))
    alone = float(numbers["tokens pair by pair"].replace(",", ""))
    assert 3 < alone / needed < 7  # twice for the base of each pair, the rest for prefix and contexts


def test_the_sample_is_scored_again_in_higher_precision(results):
    one = results["diagonal", 0][0]
    rows = len(one["row"])
    steps = set(np.diff(np.flatnonzero(np.isfinite(one["system_check"]))).tolist())
    (step,) = steps
    assert step <= 8  # check_every says 8, a short dataset wants more
    checked = np.arange(rows) % step == 0
    assert np.isfinite(one["system_check"][checked]).all() and np.isnan(one["system_check"][~checked]).all()
    assert min(rows, 16) <= checked.sum() <= 32
    off = np.abs(one["system_check"][checked] - one["system_sum"][checked])
    assert 0 < off.max() < 1e-3


def test_a_short_dataset_is_sampled_more_densely():
    two = {"dataset": np.repeat([0, 1], 400)}
    for every, rows, places, step in (
        (1024, 19_000, {}, 1024), (1024, 9_000, {}, 562), (512, 242, {}, 15), (32, 10, {}, 1), (0, 10, {}, 0),
        (64, 800, two, 25),
    ):  # fmt: skip
        assert check_step(every, rows, places) == step
        assert not step or -(-rows // step) // max(1, len(set(places.get("dataset", ())))) >= min(rows, 16)


def test_kill_9_of_the_real_job_and_other_shard_sizes_give_the_same_bytes(folder, results, tmp_path):
    want = results["diagonal", 0][0]
    env = {**os.environ, **environment(folder, "diagonal"), "SUITE_SCRATCH": str(tmp_path)}
    cell = load(folder / "diagonal" / "exp.yaml").cells(folder / "diagonal" / "cache", tmp_path)[0]
    dice = random.Random(5)
    for size in (1, 2, 3):
        before = len(scan(cell.path, cell.digest)[0])
        arguments = command(folder, "diagonal", 0, f"run.shard_rows={size}")[1:]
        job = Fork(module_work(*arguments, env=env))
        wait_until(
            lambda job=job, enough=before + 2: len(scan(cell.path, cell.digest)[0]) >= enough or job.poll() is not None,
            15,
            "no shard",
            every=0.01,
        )
        time.sleep(dice.uniform(0, 0.05))
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
        job.finish()
    assert forked(*command(folder, "diagonal", 0)[1:], env=env).returncode == 0
    experiment = load(folder / "diagonal" / "exp.yaml")
    path = merge(cell, experiment.schema(Path()), experiment.science_json())
    assert path.read_bytes() == (cells(folder, "diagonal")[0].path / "merged.h5").read_bytes()
    with h5py.File(path) as f:
        assert np.array_equal(f["system_sum"][:], want["system_sum"])


def broken_model(folder: Path, tmp_path: Path, change) -> dict[str, str]:
    """A copy of the inputs with another model, recorded as it is."""
    import shutil

    shutil.copytree(folder / "diagonal" / "cache", tmp_path / "cache")
    shutil.copytree(folder / "model", tmp_path / "model")
    change(tmp_path / "model" / "model.safetensors")
    record = next((tmp_path / "cache" / "inputs" / "models").glob("*/input.json"))
    record_again(record, tmp_path / "model")
    return environment(folder, "diagonal") | {
        "SUITE_CACHE": str(tmp_path / "cache"),
        "SUITE_SCRATCH": str(tmp_path / "s"),
    }


def set_nan(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
    save_file(tensors, path, {"format": "pt"})


def drop_tensor(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change, says",
    [
        (set_nan, "the weights hold NaN, or overflow in float32"),
        (drop_tensor, "the weights hold no tensor model.norm.weight"),
        (
            lambda p: os.truncate(p, p.stat().st_size - 1000),
            "is cut off or not a safetensors file (",
        ),
        (lambda p: p.write_bytes(b"\xff" * 100), "is cut off or not a safetensors file ("),
        (lambda p: p.unlink(), "holds no weights (model.safetensors, or"),
    ],
    ids=["nan", "missing", "truncated", "garbage", "gone"],
)
def test_broken_weights_are_one_sentence_and_no_shard(folder, tmp_path, change, says):
    env = broken_model(folder, tmp_path, change)
    done = forked(*command(folder, "diagonal", 0)[1:], env=env)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((tmp_path / "s").rglob("*.h5"))


def test_a_chat_template_that_does_not_end_is_one_sentence_and_no_shard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.models.apart.SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    env = broken_model(folder, tmp_path, lambda path: (path.parent / "chat_template.jinja").write_text(endless))
    done = forked(*command(folder, "diagonal", 0)[1:], env=env)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "the chat template with its tokenizer takes longer than 2 s" in done.stderr
    assert not list((tmp_path / "s").rglob("*.h5"))
