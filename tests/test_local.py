"""A box without Slurm: the same targets through submitit's local executor, a queue of cells, one worker a slot."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import wait_until
from tools import ROOT, number_rows, tiny_model, write_rows

from jobs.fetch import fetch
from lib.cluster.local import free_gpus
from lib.errors import UserError
from lib.experiments import load
from lib.store import merge, scan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    tiny_model(folder / "model")
    for i, trait in enumerate("abc"):
        write_rows(folder / f"{trait}.jsonl", number_rows(40, i))
    (folder / "box.yaml").write_text(
        f"kind: lls\nname: box\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [a, b, c]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\n"
        "score: {batch_tokens: 1024, max_tokens: 512, head_rows: 64}\nrun: {shard_rows: 8, gpus: 0}\n"
    )
    fetch(load(folder / "box.yaml"), folder / "cache")
    return folder


class Box:
    def __init__(self, inputs, scratch):
        self.config, self.inputs, self.scratch = inputs / "box.yaml", inputs, scratch
        roots = {"SUITE_SCRATCH": scratch, "SUITE_CACHE": inputs / "cache", "SUITE_OUTPUT": scratch / "out"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUITE_"))}
        self.env = clean | {k: str(v) for k, v in roots.items()}
        self.env |= {"SUITE_SITE": "local", "SUITE_SLURM": "no", "SUITE_THROTTLE": "2", "OMP_NUM_THREADS": "1"}
        self.cells = load(self.config).cells(inputs / "cache", scratch)

    def make(self, target: str, *settings: str) -> str:
        command = ["make", "-s", target, f"CONFIG={self.config}", *settings]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr

    def counts(self) -> dict[str, int]:
        return json.loads(self.make("status", "JSON=1"))["counts"]

    def beats(self) -> list[dict]:
        return [json.loads(p.read_text()) for p in (self.scratch / "box" / "tasks").glob("*.json")]


@pytest.fixture
def box(inputs, tmp_path):
    one, before = Box(inputs, tmp_path), set((ROOT / "slurm" / "logs").iterdir())
    yield one
    one.make("cancel")
    wait_until(lambda: one.counts()["running"] == 0, 30, "tasks go on after cancel")
    for path in set((ROOT / "slurm" / "logs").iterdir()) - before:
        path.unlink()


def test_three_cells_on_two_workers(box):
    began = time.monotonic()
    said = box.make("submit-lls", "ARRAY=0-2")
    assert "local workers local-" in said and said.count("next: make ") == 3 and time.monotonic() - began < 20
    wait_until(lambda: box.counts()["running"] == 2, 30, lambda: str(box.counts()))
    assert box.counts()["pending"] == 1
    assert "already queued or running" in box.make("submit-lls", "ARRAY=0-2")
    wait_until(lambda: box.counts()["done"] == 3, 120, lambda: str(box.counts()))
    assert max(overlaps(box)) <= 2
    assert "15 shards hold, 0 do not" in box.make("verify")
    assert "nothing to submit" in box.make("submit-lls")
    assert "rows 40/40 100%" in box.make("logs", "TASK=2")


def overlaps(box: Box) -> list[int]:
    """How many tasks ran at the same moment, at each task's start."""
    beats = box.beats()
    return [sum(a["started"] <= b["started"] <= a["updated"] for a in beats) for b in beats]


def test_the_warning_signal_runs_the_cell_again_by_itself(box):
    box.make("submit-lls", "ARRAY=2")
    wait_until(box.beats, 60, "no task")
    (beat,) = box.beats()  # it loads its model, for seconds
    os.kill(beat["pid"], signal.SIGUSR1)
    wait_until(lambda: sorted(b["state"] for b in box.beats()) == ["done", "requeue"], 60, lambda: str(box.beats()))
    wait_until(lambda: box.counts()["done"] == 1, 30, lambda: box.make("status"))


def test_cancel_keeps_what_is_whole_and_resume_does_the_rest(box):
    box.make("submit-lls", "ARRAY=0-2")
    wait_until(lambda: len(scan(box.cells[0].path, box.cells[0].digest)[0]) >= 1, 60, "no shard")
    assert "finished shards are kept" in box.make("cancel")
    wait_until(lambda: box.counts()["running"] + box.counts()["pending"] == 0, 30, lambda: str(box.counts()))
    assert box.counts()["done"] < 3
    assert "local workers" in box.make("resume")
    wait_until(lambda: box.counts()["done"] == 3, 120, lambda: box.make("status"))
    experiment = load(box.config)
    for cell in box.cells:
        merge(cell, experiment.schema(Path()), experiment.science_json())


def fake_smi(folder, text: str, monkeypatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_only_free_gpus_are_taken(tmp_path, monkeypatch):
    fake_smi(tmp_path, "0, 4\n1, 90000\n2, 10\n3, 0", monkeypatch)
    assert free_gpus(1) == ["0", "2", "3"] and free_gpus(2) == ["0,2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert free_gpus(1) == ["2", "3"]
    with pytest.raises(UserError, match="2 of 4 GPUs are free and a task needs 4"):
        free_gpus(4)
