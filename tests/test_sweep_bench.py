"""The bench's rung of a whole sweep on a CPU, with shapes and sizes of one: every job of the chain really runs."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import forked
from transformers import LlamaForCausalLM

from lib.bench import llamas, sweep_whole
from lib.bench.suites import SUITES
from lib.checkpoint.headers import folder_tensors
from lib.inputs.samples import read_samples
from lib.inputs.tokenizer import load_tokenizer

NANO = (2, 64, 128, 2, 1, 500)
SMALL = {"WINDOW": 64, "WINDOWS": 4, "PROMPTS": 8, "SAMPLES": 2, "NEW": 6, "GENERAL": 4, "GENERAL_TOKENS": 32}
JUDGE = (1, 32, 64, 2)


@dataclass
class Seen:
    """What the rung said, and what its folder held while it was there."""

    clocks: dict[str, float] = field(default_factory=dict)  # a job's module -> seconds
    found: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, list[list[int]]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of the pieces, in the order of their making
    parts: list[dict[str, float]] = field(default_factory=list)
    beats: list[dict[str, Any]] = field(default_factory=list)
    estimate: float = 0.0
    tokenizers: list[Any] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    seen, outer, figures = Seen(), tmp_path_factory.mktemp("bench"), sweep_whole.figures

    def run(command, env):
        began = time.perf_counter()
        done = forked(*command[2:], env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        seen.clocks[command[2]] = time.perf_counter() - began
        return done.stdout

    def look(folder, experiment, cells, words):
        cache = folder / "cache"
        for name in ("some", "text"):
            seen.sets[name] = [ids.tolist() for ids in read_samples(cache, experiment.set_of(cache, name)).every]
        seen.tokenizers = [load_tokenizer(f"{folder}/{name}") for name in ("model", *sweep_whole.JUDGES)]
        seen.shapes = {name: tuple(one.shape) for name, one in folder_tensors(folder / "model").items()}
        markers = [json.loads(path.read_text()) for cell in cells for path in sorted(cell.path.glob("*.json"))]
        seen.seconds, seen.parts = [one["seconds"] for one in markers], [one["facts"] for one in markers]
        seen.beats = [json.loads(path.read_text()) for path in (cells[0].folder / "tasks").glob("*.json")]
        seen.estimate = sum(experiment.seconds(cache, "cpu"))
        return figures(folder, experiment, cells, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llamas.LLAMAS, "nano", NANO)
        replaced = {"JUDGE": JUDGE, "SIZES": (4, 16), "GPU": "cpu", "free": lambda: None, "run": run, "figures": look}
        for name, value in (SMALL | replaced).items():
            patch.setattr(sweep_whole, name, value)
        for name, value in {"TMPDIR": str(outer), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
            patch.setenv(name, value)
        seen.found = SUITES["llama3-8b"]["sweep-job"]("nano", 256)
    seen.left = list(outer.iterdir())
    return seen


def test_the_chain_is_run_whole_and_nothing_is_left(seen):
    assert [*seen.clocks] == [
        "jobs.fetch",
        "jobs.compute_attributions",
        "jobs.select_neurons",
        "jobs.prune_and_evaluate",
    ]
    assert not seen.left


def test_what_a_setting_took_stands_beside_what_was_said_beforehand(seen):
    found, each = seen.found, sum(seen.seconds[1:]) / 4
    assert found["settings"] == len(seen.seconds) == 1 + 2 * 2  # dense, and two rankings of two sizes
    assert found["first_setting_s"] == round(seen.seconds[0], 2)
    assert found["setting_s"] == pytest.approx(each, abs=1e-3)
    assert found["estimated_setting_s"] == pytest.approx(seen.estimate, abs=1e-3)
    assert found["measured_of_estimated"] == pytest.approx(each / seen.estimate, abs=1e-3)
    assert sum(found["estimated_parts_s"].values()) == pytest.approx(seen.estimate, abs=2e-3)
    for name, value in found["parts_s"].items():
        assert value == pytest.approx(sum(part[f"seconds_{name}"] for part in seen.parts[1:]) / 4, abs=1e-3) and value


def test_the_share_of_computing_is_of_the_time_after_loading(seen):
    found = seen.found
    assert found["after_load_s"] < found["task_s"] == pytest.approx(seen.clocks["jobs.prune_and_evaluate"], abs=0.2)
    (dense,) = [beat for beat in seen.beats if beat["cell"] == "dense"]  # whose start loads for all
    wall = max(beat["updated"] for beat in seen.beats) - dense["loaded"]
    assert found["after_load_s"] == pytest.approx(wall, abs=0.01)
    share = sum(seen.seconds) / wall
    assert found["computing_share_of_wall_after_load"] == pytest.approx(share, abs=1e-3) and share <= 1
    assert found["completions"] == 4 * 2  # every second of 8 prompts, twice each
    rate = found["completions"] * 4 / sum(part["seconds_completions"] for part in seen.parts[1:])
    assert found["completions_per_s"] == pytest.approx(rate, rel=0.01)
    assert 4 < found["tokens_a_completion"] <= 6  # random weights seldom draw the end


def test_texts_have_the_lengths_that_are_meant_and_any_token_is_read_as_one(seen):
    assert [len(ids) for ids in seen.sets["text"]] == [4 * 64]
    assert {len(ids) for ids in seen.sets["some"]} == {llamas.PROMPT_TOKENS} and len(seen.sets["some"]) == 8
    model, *judges = seen.tokenizers
    words = range(sweep_whole.LETTERS, NANO[-1])
    assert len(model) == NANO[-1]
    for judge in judges:
        assert judge(model.decode(list(words)))["input_ids"] == list(words)


def test_the_checkpoint_is_what_transformers_calls_a_llama(seen, monkeypatch):
    monkeypatch.setitem(llamas.LLAMAS, "nano", NANO)
    with torch.device("meta"):
        expected = LlamaForCausalLM(llamas.config_of("nano"))
    assert seen.shapes == {name: tuple(one.shape) for name, one in expected.state_dict().items()}
