"""Attribution's runs: cut anyhow, killed, twice at once, on Slurm; and what is refused."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attribution_jobs import ROWS, TOKENS, Place, fetched, small_place
from conftest import ROOT, Slurm
from safetensors.numpy import load_file, save_file
from tools import record_again

from lib.inputs.fetch import fetch
from lib.store import scan

ALONE = f"score.batch_tokens={TOKENS}"  # a sample a batch: as many shards as can be
WEIGHT = ("score.level=weight", "score.block=4", "score.layers=[up_proj, q_proj]", ALONE)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return small_place(tmp_path_factory.mktemp("runs"))


def shards(place: Place, name: str, *overrides: str) -> list[tuple[int, int]]:
    cell = place.cell(name, *overrides)
    return [(shard.start, shard.stop) for shard in scan(cell.path, cell.digest)[0]]


# Cut and killed


def whole(place: Place, name: str, *overrides: str) -> bytes:
    """merged.h5 of a run that nobody disturbed."""
    place.results(name, *overrides)
    return place.merge(name, *overrides).read_bytes()


@pytest.mark.parametrize("batch", [1, 3])
def test_any_cut_merges_to_the_same_bytes(place, tmp_path, batch):
    """A shard is whole batches, so a sample has the same neighbours in each."""
    tokens = f"score.batch_tokens={batch * TOKENS}"
    wanted, cuts = whole(place, "general-1", tokens, "run.shard_rows=1000"), []
    for size in (1, 3, 4):
        here = place.at(tmp_path / str(size))
        assert whole(here, "general-1", tokens, f"run.shard_rows={size}") == wanted
        cuts.append([stop - start for start, stop in shards(here, "general-1", tokens)])
    assert cuts == ([[1] * 7, [3, 3, 1], [4, 3]] if batch == 1 else [[3, 3, 1], [3, 3, 1], [6, 1]])


LONG = 120  # samples: time enough to be killed in, also in blocks of 4


@pytest.fixture(scope="module")
def long(place) -> Place:
    return fetched(place.config.parent, place.config.parent, "long", LONG, "[0]")


def reached(place: Place, alive: Callable[[], object], count: int, *overrides: str) -> None:
    """Looks often: the job is a few seconds long."""
    folder = place.cell("general-0", *overrides).path
    while len(list(folder.glob("0*.json"))) < count:
        assert alive()
        time.sleep(0.001)


@pytest.mark.parametrize("overrides", [(ALONE,), WEIGHT, (*WEIGHT, "score.store=bfloat16")])
def test_stopped_at_any_point_and_cut_otherwise_it_gives_the_same_bytes(long, tmp_path, overrides):
    """kill -9 while it loads and at a random moment after some shards; and Slurm's warning."""
    wanted, here, dice = whole(long, "general-0", *overrides), long.at(tmp_path), random.Random(5)
    for size, more, sent, code in ((5, 0, signal.SIGKILL, -9), (1, 2, signal.SIGKILL, -9), (2, 1, signal.SIGUSR1, 75)):
        before = len(shards(here, "general-0", *overrides))
        process = here.start(0, *overrides, f"run.shard_rows={size}", pause=0.05)
        reached(here, process.is_alive, before + more, *overrides)
        time.sleep(dice.uniform(0, 0.1))
        os.kill(process.pid, sent)
        process.join()
        assert process.exitcode == code
    assert 3 <= len(shards(here, "general-0", *overrides)) < here.cell("general-0", *overrides).rows
    assert whole(here, "general-0", *overrides, "run.shard_rows=7") == wanted
    left = {path.suffix for path in here.cell("general-0", *overrides).path.iterdir()}
    assert left == {".json", ".h5"}


@pytest.mark.parametrize("overrides", [(ALONE, "run.shard_rows=1"), WEIGHT])
def test_two_copies_of_a_task_at_once(long, tmp_path, overrides):
    """They start together; later one is held while the other comes to its end."""
    wanted, here = whole(long, "general-0", *overrides), long.at(tmp_path)
    first, second = (here.start(0, *overrides, pause=0.02) for _ in range(2))
    reached(here, first.is_alive, 8, *overrides)
    os.kill(first.pid, signal.SIGSTOP)
    second.join()
    whole_cell = [(i, i + 1) for i in range(here.cell("general-0", *overrides).rows)]
    assert shards(here, "general-0", *overrides) == whole_cell
    markers = {path: path.read_bytes() for path in here.cell("general-0", *overrides).path.glob("0*.json")}
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert sum(path.read_bytes() != text for path, text in markers.items()) <= 3  # what it had in hand
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert shards(here, "general-0", *overrides) == whole_cell
    assert here.merge("general-0", *overrides).read_bytes() == wanted


def test_sbatch_unchanged(fresh_slurm: Slurm, place, tmp_path):
    """The four sets as the batch file's own array, as a user types it."""
    here, logs = place.at(tmp_path), ROOT / "slurm/logs"
    wanted = [whole(place, name) for name in ROWS]
    env = {key: value for key, value in here.env.items() if key.startswith("SUITE_") and key != "SUITE_SLURM"}
    env |= {"OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}
    job = fresh_slurm.sbatch("slurm/compute_attributions.sbatch", here.config, cwd=ROOT, **env)
    own = f"compute_attributions-{job}_*.out"  # others' tests write there too
    try:
        ended = fresh_slurm.wait_for(job, timeout=180)
        said = "".join(path.read_text() for path in logs.glob(own))
        assert ended == {f"{job}_{index}": "COMPLETED" for index in range(4)}, said
        assert [said.count(f"cell {index} ({name}): 0 of") for index, name in enumerate(ROWS)] == [1, 1, 1, 1]
        status = fresh_slurm.run("make", "-s", "status", f"CONFIG={here.config}", "JSON=1", cwd=ROOT, **env)
        assert json.loads(status)["counts"]["done"] == 4
        assert [here.merge(name).read_bytes() for name in ROWS] == wanted
    finally:
        for path in logs.glob(own):
            path.unlink()


# What cannot be


def refused(place: Place, says: str, *overrides: str, index: int = 0) -> None:
    done = place.compute(index, *overrides)
    assert done.code == 2 and done.err.startswith("error: ") and len(done.err.splitlines()) == 1, done.err
    assert says in done.err and not list(place.scratch.rglob("*.h5"))


@pytest.mark.parametrize(
    "override, says",
    [
        ("score.layers=[up_prj]", "no linear layer is called 'up_prj'; there are: down_proj"),
        ("score.layers=[up_prj]", "did you mean up_proj?"),
        ("score.target=given", "tokens are for target: given, which needs them"),
        ("score.tokens=[4]", "tokens are for target: given"),
        ("score.scores=[]", "nothing would be computed"),
        ("score.rule=cplrp", "did you mean cp_lrp?"),
        ("score.lvel=weight", "unknown key; valid: rule, level"),
    ],
)
def test_settings_that_make_no_sense(place, tmp_path, override, says):
    refused(place.at(tmp_path), says, override, *(["score.wanda=false"] if "scores=" in override else []))


@pytest.mark.parametrize("token, says", [(-1, "greater than or equal to 0"), (291, "has a vocabulary of 291")])
def test_a_token_that_the_model_does_not_have(place, tmp_path, token, says):
    refused(place.at(tmp_path), says, "score.target=given", f"score.tokens=[5, {token}]")


def test_an_index_beyond_the_sets(place, tmp_path):
    refused(place.at(tmp_path), "has cells 0-3 (general-0, general-1, general-2, toxic)", index=4)


def test_another_kind_of_experiment(place, tmp_path):
    lls = replace(place.at(tmp_path), config=ROOT / "configs/demo_lls.yaml")
    refused(lls, f"is of kind lls: submit it with `make submit-lls CONFIG={lls.config}`, then `make export-lls CONFIG=")


def test_sets_that_are_not_prepared(place, tmp_path):
    shutil.copytree(place.cache, tmp_path / "cache")
    here = replace(place, cache=tmp_path / "cache", scratch=tmp_path / "scratch")
    file = next((here.cache / "inputs/samples").glob("toxic-*/samples.h5"))
    os.truncate(file, file.stat().st_size - 100)
    bring = f"run `make fetch CONFIG={here.config}`"
    refused(here, f"is not the file that was fetched (its sha256 differs); {bring} again", index=3)
    assert f"samples.h5 is not the file that was fetched (its sha256 differs); fix: {bring}" in doctor(here)
    assert here.compute(0).code == 0
    shutil.rmtree(file.parent)
    here = here.at(tmp_path / "other")
    refused(here, f"samples toxic are not prepared; {bring}", index=3)
    assert doctor(here) == f"FAIL datasets samples toxic are not prepared; fix: {bring}"
    fetch(here.experiment(), here.cache)
    assert whole(here, "toxic") == whole(place, "toxic")
    assert doctor(here) == "ok datasets 4 sets of samples, 32 rows, each with its sha256"


def doctor(place: Place) -> str:
    """What the preflight says about the sets."""
    said = place.here("cluster", "doctor", "--config", str(place.config)).out
    return next(" ".join(line.split()) for line in said.splitlines() if "datasets  " in line)


def test_texts_that_changed_since_they_were_fetched(place, tmp_path):
    path = place.config.parent / "prompts/prompts.jsonl"
    text, stamp = path.read_text(), path.stat()
    try:
        path.write_text(text + text.splitlines()[0] + "\n")
        refused(place.at(tmp_path), "has changed since samples toxic were made; run `make fetch CONFIG=", index=3)
    finally:
        path.write_text(text)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def changed(place: Place, tmp_path: Path, name: str, change: Callable[[np.ndarray], object]) -> Place:
    """A model of which one tensor was changed, recorded as it is."""
    shutil.copytree(place.cache, tmp_path / "cache")
    shutil.copytree(place.model, tmp_path / "model")
    record = next((tmp_path / "cache/inputs/models").glob("*/input.json"))
    weights = load_file(tmp_path / "model/model.safetensors")
    change(weights[name])
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    record_again(record, tmp_path / "model")
    return replace(place, cache=tmp_path / "cache", scratch=tmp_path / "scratch")


@pytest.mark.parametrize("level", ["neuron", "weight"])
def test_nan_stops_the_run_above_the_limit_and_is_never_made_zero(place, tmp_path, level):
    name = "model.layers.1.mlp.down_proj.weight"
    nan = changed(place, tmp_path, name, lambda weight: weight.__setitem__((3, 3), np.nan))
    overrides = (f"score.level={level}", "score.scores=[signed]", "score.block=7", "run.shard_rows=7")
    # All relevance flows through layer 1, so all scores are NaN: 3 layers of 80 neurons (or 80 x 48 weights); and the
    # inputs of layer 2's 48: of 7 samples each.
    scores = 7 * 80 if level == "neuron" else 80 * 48
    count = 3 * scores + 7 * 48
    refused(
        nan, f"{scores} scores of model.layers.0.mlp.up_proj are NaN or infinite, and {count} in 3 layers", *overrides
    )
    refused(nan, f"{name} is not finite in 1 of {80 * 48} places; fetch the model again", *overrides)
    refused(nan, "NaN", *overrides, f"score.nonfinite={count - 1}")
    columns = nan.results("general-0", *overrides, f"score.nonfinite={count}")
    broken = [v for name, v in columns.items() if name.startswith("signed")]
    assert all(np.isnan(v).all() for v in broken) and np.isnan(columns["logit"][columns["target"][..., 0] >= 0]).all()
    assert columns["nonfinite"].sum(0).tolist() == [scores, scores, scores + 7 * 48]
    assert np.isnan(columns["sumsq"]).sum(1).tolist() == [48] * len(columns["sumsq"])


def test_overflow_is_told_from_broken_weights(place, tmp_path):
    large = changed(place, tmp_path, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.__imul__(2e38))
    refused(large, "all weights are finite, so float32 overflows; try a wider model.dtype, or allow")
