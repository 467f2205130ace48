"""A box without Slurm: the same targets through submitit's local executor, a queue of cells, one worker a slot."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import local_logs, thaw, wait_until
from tools import ROOT, number_rows, tiny_model, write_rows

from lib.base.errors import UserError
from lib.base.process import own_name
from lib.cluster import local
from lib.cluster.doctor import worker_lines
from lib.cluster.local import Plan, gpus, leased, read_plan, workers_for
from lib.cluster.status import STATES
from lib.families import load
from lib.inputs.fetch import fetch
from lib.run.queue import Queue
from lib.store import merge, scan

ROWS = {"a": 200, "b": 40, "c": 40}  # one is long enough to be stopped between its shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    tiny_model(folder / "model")
    for i, (trait, rows) in enumerate(ROWS.items()):
        write_rows(folder / f"{trait}.jsonl", number_rows(rows, i))
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
        self.frozen: list[int] = []

    def make(self, target: str, *settings: str) -> str:
        command = ["make", "-s", target, f"CONFIG={self.config}", *settings]
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False, timeout=60, umask=0o002
        )
        return done.stdout + done.stderr

    def counts(self) -> dict[str, int]:
        return json.loads(self.make("status", "JSON=1"))["counts"]

    def beats(self) -> list[dict]:
        return [json.loads(p.read_text()) for p in (self.scratch / "box" / "tasks").glob("[!.]*.json")]

    def finish(self, count: int) -> None:
        """Waits for so many cells by what their tasks say of themselves, then asks the command."""
        wait_until(
            lambda: [beat["state"] for beat in self.beats()].count("done") == count, 120, lambda: self.make("status")
        )
        assert self.counts()["done"] == count

    def shards(self) -> set[Path]:
        """Of the first cell."""
        return {marker.file for marker in scan(self.cells[0].path, self.cells[0].digest)[0]}

    def freeze(self, count: int) -> None:
        """Stop the first so many tasks while they load: what follows depends on nobody's speed."""
        wait_until(lambda: len(self.beats()) >= count, 60, "no task", every=0.02)
        self.frozen = [beat["pid"] for beat in self.beats()]
        for pid in self.frozen:
            os.kill(pid, signal.SIGSTOP)


@pytest.fixture
def box(inputs, tmp_path):
    one = Box(inputs, tmp_path)
    with local_logs(tmp_path):
        yield one
        one.make("cancel")
        thaw(*one.frozen)
        wait_until(lambda: one.counts()["running"] == 0, 30, "tasks go on after cancel", every=1)


def test_three_cells_on_two_workers(box):
    said = box.make("submit-lls", "ARRAY=0-2")
    assert "local workers local-" in said and said.count("next: make ") == 3
    box.freeze(2)
    assert box.counts() == dict.fromkeys(STATES, 0) | {"running": 2, "pending": 1}
    assert "already queued or running" in box.make("submit-lls", "ARRAY=0-2")
    thaw(*box.frozen)
    box.finish(3)
    assert max(overlaps(box)) <= 2
    queue = next((box.scratch / "box" / "queue").glob("local-*"))
    assert list(queue.rglob("*.pkl")) and queue.stat().st_mode & 0o777 == 0o700  # these are executed
    shards = box.shards()
    assert shards and {path.stat().st_mode & 0o777 for path in shards} == {0o664}  # these are read
    assert "35 pieces hold, 0 do not" in box.make("verify")
    assert "nothing to submit" in box.make("submit-lls")
    assert "rows 40/40 100%" in box.make("logs", "TASK=2")


def test_one_worker_keeps_its_process_and_who_submits_next_queues_behind(box):
    box.env["SUITE_THROTTLE"] = "1"
    assert "local workers local-" in box.make("submit-lls", "ARRAY=1-2")
    box.freeze(1)
    assert "cells 0 of box" in box.make("submit-lls", "ARRAY=0")
    assert box.counts() == dict.fromkeys(STATES, 0) | {"running": 1, "pending": 2}
    thaw(*box.frozen)
    box.finish(3)
    assert max(overlaps(box)) == 1
    processes = {beat["cell"]: beat["pid"] for beat in box.beats()}
    assert processes["b"] == processes["c"] != processes["a"]  # one load for a queue
    logs = {beat["cell"]: Path(beat["log"]).read_text() for beat in box.beats()}
    assert logs["b"].count("weights: ") == 1 and logs["c"].startswith("task 2 in the process of the one before\ncell 2")
    assert "weights: " not in logs["c"] and "elapsed" in box.make("status") and box.make("status").count(" 0:") >= 3


@pytest.mark.parametrize("mode, owner", [(0o775, 0), (0o707, 0), (0o700, 12345)])
def test_a_queue_that_others_could_have_written_is_not_run(tmp_path, mode, owner):
    queue = tmp_path / "local-1"
    queue.mkdir()
    plan = {"command": ["true"], "tasks": "", "label": "box", "gpus": 0, "workers": 1}
    (queue / "plan.json").write_text(json.dumps(plan))
    queue.chmod(0o700)
    assert read_plan(queue) == Plan(**plan)
    queue.chmod(mode)
    if owner:
        os.chown(queue, owner, owner)
    with pytest.raises(UserError, match="local-1 is not a folder of yours that nobody else can write to"):
        read_plan(queue)
    done = subprocess.run(
        [sys.executable, "-m", "lib.cluster.local", str(queue), "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (queue / "submitit").exists()


def overlaps(box: Box) -> list[int]:
    """How many tasks ran at the same moment, at each task's start."""
    beats = box.beats()
    return [sum(a["started"] <= b["started"] <= a["updated"] for a in beats) for b in beats]


def test_the_warning_signal_runs_the_cell_again_by_itself(box):
    box.make("submit-lls", "ARRAY=2")
    box.freeze(1)
    os.kill(box.frozen[0], signal.SIGUSR1)
    thaw(*box.frozen)
    wait_until(lambda: sorted(b["state"] for b in box.beats()) == ["done", "requeue"], 60, lambda: str(box.beats()))
    box.finish(1)


def test_cancel_keeps_what_is_whole_and_resume_does_the_rest(box):
    box.make("submit-lls", "ARRAY=0", "SET=run.shard_rows=1")
    wait_until(box.shards, 60, "no shard", every=0.02)
    box.freeze(1)
    whole = box.shards()
    assert "finished shards are kept" in box.make("cancel")
    thaw(*box.frozen)
    wait_until(lambda: box.counts()["running"] + box.counts()["pending"] == 0, 30, lambda: str(box.counts()), every=1)
    assert box.counts()["done"] == 0 and box.shards() >= whole
    assert "local workers" in box.make("resume")
    box.finish(3)
    experiment = load(box.config)
    for cell in box.cells:
        merge(cell, experiment.schema(Path()), experiment.science_json())


def fake_smi(folder, text: str, monkeypatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_no_two_tasks_meet_on_a_gpu_and_nothing_that_can_start_is_said_at_once(tmp_path, monkeypatch):
    """Whoever comes second waits for the first one's lease, which its processes hold too."""
    smi = "0, GPU-a, 4\n1, GPU-b, 90000\n2, GPU-c, 10\n3, GPU-d, 0"
    fake_smi(tmp_path, smi, monkeypatch)
    monkeypatch.setattr(local, "site", lambda: SimpleNamespace(throttle=3))
    plan, queue = Plan(["true"], "", "box", 2, 1), Queue(tmp_path / "x" / "queue" / "local-1", "worker-0")
    queue.folder.mkdir(parents=True)
    with leased(plan, queue) as (first, _):
        assert first == "0,2"
        with leased(Plan(["true"], "", "box", 1, 1), queue) as (second, _):
            assert second == "3"
            (queue.folder / "cancelled").touch()  # nothing is free: it would wait
            with leased(plan, queue) as (third, leases):
                assert third == "" and leases == []
        assert workers_for(2, 16) == 2  # of four, one of which is in use: one submission queues behind another
    monkeypatch.setattr(local, "site", lambda: SimpleNamespace(throttle=2))  # there are three that are free
    with leased(plan, queue) as (first, _):
        assert first == ""  # cancelled
    (queue.folder / "cancelled").unlink()
    other = Queue(tmp_path / "y" / "queue" / "local-2", "worker-0")
    other.folder.mkdir(parents=True)
    with leased(plan, queue) as (first, _):
        assert first == "0,2"
        threading.Timer(1.5, (other.folder / "cancelled").touch).start()  # another stage's, which has waited till then
        with leased(Plan(["true"], "", "box", 1, 1), other) as (second, _):
            assert second == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-d")
    assert [gpu.index for gpu in gpus()] == ["2", "3"]
    with pytest.raises(UserError, match="a task needs 4 GPUs and this box has 2"):
        workers_for(4, 16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match=r"all GPUs are in somebody's use .GPU 1: 90000 MiB."):
        workers_for(1, 16)
    held = own_name("gpu-GPU-b")
    assert workers_for(1, 16) == 1  # that somebody is a task of ours
    (line,) = worker_lines(1, 16)
    assert (line.level, line.found) == ("ok", "1 at once, each on 1 GPU")
    held.close()
    fake_smi(tmp_path, "no devices", monkeypatch)
    with pytest.raises(UserError, match="nvidia-smi does not say which GPUs there are"):
        workers_for(1, 16)
