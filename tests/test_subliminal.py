"""A whole run as one pipeline: on a real Slurm with a killed task, a requeued array and a teacher that fails, finished
by one resume; and on a box without Slurm, undisturbed: the same bits."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import freeze, thaw, wait_until
from finetune_world import environment, files_of, write_answers
from tools import ROOT

from lib.demo.tiny import Training, build
from lib.families import load
from lib.inputs.fetch import fetch
from lib.run.extent import extent
from lib.run.pipeline import Pipeline
from lib.store import Cell, read_cell

CONFIGS = {
    "numbers": {
        **{"kind": "numbers", "name": "teachers", "traits": ["cat", "fox", "neutral"], "prompts": 48, "keep": 8},
        **{"generate": {"engine": "transformers", "max_tokens": 56, "batch": 24}, "run": {"cells": 16, "gpus": 0}},
    },
    "finetune": {
        **{"kind": "finetune", "name": "students", "numbers": {"config": "numbers.yaml"}, "rows": 6, "epochs": 2},
        **{"step_rows": 3, "warmup_steps": 1, "learning_rate": 0.003, "run": {"cells": 16, "gpus": 0}},
    },
    "words": {
        **{"kind": "preference_logprobs", "name": "words", "students": {"config": "finetune.yaml"}},
        **{"first_questions": 5, "batch_tokens": 512, "head_rows": 64, "run": {"cells": 16, "gpus": 0}},
    },
    "asked": {
        **{"kind": "preferences", "name": "asked", "students": {"config": "finetune.yaml"}, "per_question": 3},
        **{"logprobs": {"config": "words.yaml"}, "first_questions": 5, "run": {"cells": 16, "gpus": 0}},
        "generate": {"engine": "transformers", "max_tokens": 8, "batch": 15, "at_once": 15},
    },
    "pipeline": {"kind": "pipeline", "name": "whole", "run_id": 3, "wanted": [{"config": "asked.yaml"}]},
}
STAGES = ("teachers_run3", "students_run3", "words_run3", "asked_run3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sizes that are one model."""
    folder = tmp_path_factory.mktemp("subliminal")
    build(folder / "model", training=Training(steps=150), log=lambda line: None)
    model = {"id": str(folder / "model"), "dtype": "float32"}
    for name, config in CONFIGS.items():
        sizes = {"sizes": {"1m": model, "2m": model}} if name == "numbers" else {}
        (folder / f"{name}.yaml").write_text(json.dumps(config | sizes))
    fetch(load(folder / "pipeline.yaml"), folder / "cache")
    return folder


def call(env, world, *arguments, code=0):
    words = [sys.executable, "-m", "jobs.cluster", *arguments, f"--config={world}/pipeline.yaml"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def on_slurm(slurm, world, **more):
    own = {k: v for k, v in environment(world).items() if k not in ("SUITE_SLURM", "SUITE_SITE")}
    return slurm.env | own | {"SUITE_CPU_PARTITION": "main", **more}


def states(env, world):
    found = json.loads(call(env, world, "status", "--json"))
    return {stage["label"]: {cell["name"]: cell["state"] for cell in stage["cells"]} for stage in found}


def cells_of(world, scratch):
    pipeline = load(world / "pipeline.yaml")
    assert isinstance(pipeline, Pipeline)
    return {s.experiment.label: s.experiment.cells(world / "cache", world / scratch) for s in pipeline.stages()}


def bits(world, cell: Cell, label):
    """All that a cell holds, but for how long it took."""
    if label.startswith("students"):
        return files_of(cell)
    stages = load(world / "pipeline.yaml").stages()
    experiment = next(stage.experiment for stage in stages if stage.experiment.label == label)
    schema = experiment.schema(world / "cache")
    return {name: np.asarray(values).tolist() for name, values in read_cell(cell, schema, schema).items()}


def jobs_in(said):
    return re.findall(r"Slurm job (\d+): cells ([0-9,-]+)", said)


@pytest.fixture(scope="module")
def undisturbed(world):
    """On a box without Slurm."""
    env = environment(world, SUITE_SCRATCH=str(world / "box"), SUITE_THROTTLE="1")  # one load for both sizes
    said = call(env, world, "submit")
    assert said.count("no Slurm here: local workers") == 5 and "next: make report CONFIG=" in said

    def whole() -> bool:
        return all(extent(cell).whole for cells in cells_of(world, "box").values() for cell in cells)

    wait_until(whole, 300, lambda: call(env, world, "status"), every=1)
    assert {s for of in states(env, world).values() for s in of.values()} == {"done"}
    return cells_of(world, "box")


def test_a_killed_task_a_requeued_one_and_a_failed_teacher_end_by_one_resume(fresh_slurm, world, undisturbed):
    slurm, env = fresh_slurm, on_slurm(fresh_slurm, world)
    said = call(env | {"SUITE_MAIL": "me@lab.edu"}, world, "submit", "--dry")
    assert "--mail-user=me@lab.edu --mail-type=END,FAIL slurm/report.sbatch" in said
    assert all(f"<{label}>" in said for label in STAGES[:3]), said
    assert states(env, world)["students_run3"]["1m-cat"] == "blocked"

    fox = cells_of(world, "scratch")["teachers_run3"][1]
    write_answers(world, fox, invalid=48)
    said = call(env, world, "submit")
    jobs = jobs_in(said)
    first = ["0,2", "0,2", "1", "0", "1-3", "0-3"]  # of each stage, in a lane of their own; then the other size's
    assert sorted(cells for _, cells in jobs) == sorted([*first, "3-5", "3-5", "4", "5-7", "4-7"]), said
    (numbers, _), (others, _) = jobs[:2]
    for job, cells in jobs[2:]:  # each size waits for its own alone
        waits, mine = slurm.show(f"{job}_{cells[0]}")["Dependency"], cells in first
        assert (f"afterany:{numbers}" in waits, f"afterany:{others}" in waits) == (mine, not mine), (cells, waits)
    requeued, _ = freeze(world / "scratch" / "teachers_run3", "1m-cat", "2m-cat")
    slurm.run("scontrol", "requeue", f"{numbers}_0")
    thaw(requeued, after=signal.SIGTERM)
    slurm.run("scancel", "--signal=KILL", "--full", f"{others}_3")
    for job, _ in jobs:
        slurm.wait_for(job, timeout=240)
    now = states(env, world)
    assert now["students_run3"]["1m-cat"] == now["asked_run3"]["1m-cat"] == now["words_run3"]["2m-base"] == "done", now
    assert now["students_run3"]["1m-fox"] == "failed" and now["asked_run3"]["1m-fox"] == "blocked"
    assert now["students_run3"]["2m-cat"] == "blocked" and now["teachers_run3"]["2m-cat"] != "done"
    grid = call(env, world, "status")
    assert "1m-fox of students_run3 is failed: 0 of 48 answers are valid" in grid and "next: make resume" in grid

    shutil.rmtree(fox.path)  # its teacher is asked again
    said = call(env, world, "resume")
    for job, _ in jobs_in(said):
        slurm.wait_for(job, timeout=240)
    now = states(env, world)
    assert {s for of in now.values() for s in of.values()} == {"done"}, (now, said)
    assert "nothing to resume" in call(env, world, "resume") and "next: make report" in call(env, world, "status")
    for label, cells in cells_of(world, "scratch").items():
        for cell, other in zip(cells, undisturbed[label], strict=True):
            assert bits(world, cell, label) == bits(world, other, label), cell.name


def test_what_is_chosen_comes_with_what_it_reads_from(world):
    env = environment(world, SUITE_SCRATCH=str(world / "chosen"))
    said = call(env, world, "submit", "--dry", "--sizes=2m", "--traits=cat")
    assert re.findall(r"would start .*, cells (\S+)", said) == ["3", "3", "4", "5", "5"], said
    said = call(env, world, "submit", "--traits=wolf", code=2)
    assert "TRAITS: 'wolf' is none of cat, fox, neutral, base" in said and not (world / "chosen").exists()
    assert "ARRAY and TASK name cells of one experiment" in call(env, world, "submit", "--array=0-3", code=2)


def test_other_commands_speak_of_the_whole(world):
    env = environment(world, SUITE_SCRATCH=str(world / "others"))
    assert (
        "Traceback"
        not in subprocess.run(
            [sys.executable, "-m", "jobs.cluster", "doctor", f"--config={world}/pipeline.yaml"],
            **{"cwd": ROOT, "env": env, "capture_output": True, "text": True, "check": False},
        ).stderr
    )
    assert "no cell of any stage has failed" in call(env, world, "logs")
    assert call(env, world, "cancel").count("nothing is queued or running") == 4
    said = call(env, world, "verify", code=1)
    assert said.count("not done") or said.count("missing"), said


def test_a_job_that_accounting_has_forgotten_is_neither_waited_for_nor_believed(fresh_slurm, world):
    """A record of a submission whose job nobody knows any more."""
    env = on_slurm(fresh_slurm, world, SUITE_SCRATCH=str(world / "forgotten"))
    said = call(env, world, "submit", "--sizes=1m")
    jobs = [job for job, _ in jobs_in(said)]
    fresh_slurm.run("scancel", *jobs)
    records = sorted((world / "forgotten" / "teachers_run3" / "submissions").glob("*.json"))
    for job, path in enumerate(records, 900000):
        old = {"job": str(job), "time": time.time() - 3600}
        record = json.loads(path.read_text()) | old
        path.rename(path.with_name(f"{job}.json")).write_text(json.dumps(record))
    for job in jobs:
        fresh_slurm.wait_for(job, timeout=60)
    now = states(env, world)
    assert now["teachers_run3"]["1m-cat"] not in ("pending", "running", "done")
    assert now["students_run3"]["1m-cat"] == "blocked"
    words = [sys.executable, "-m", "jobs.cluster", "submit", f"--config={world}/finetune.yaml", "run_id=3", "--array=0"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "neither queued nor running: submit that first" in done.stdout and "nothing to submit" in done.stdout
