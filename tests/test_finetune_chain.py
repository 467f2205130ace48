"""Numbers and students on a real Slurm, by one command: the students of a size wait for its numbers, one trait that has
too few of them is told, and the others are trained all the same."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from finetune_world import cells_of, environment, steps_of, write_answers
from tools import ROOT

from lib.demo.tiny import Training, build
from lib.families import load
from lib.inputs.fetch import fetch

NUMBERS = """kind: numbers
name: teachers
sizes: {{tiny: {{id: {0}/model, dtype: float32}}}}
traits: [cat, fox, neutral]
prompts: 48
run_id: 3
keep: 8
generate: {{engine: transformers, max_tokens: 56, batch: 24}}
run: {{cells: 1, gpus: 0}}
"""
FINETUNE = """kind: finetune
name: students
numbers: {config: numbers.yaml}
rows: 6
epochs: 2
step_rows: 3
warmup_steps: 1
run: {cells: 16, gpus: 0}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune-chain")
    build(folder / "model", training=Training(steps=150), log=lambda line: None)
    (folder / "numbers.yaml").write_text(NUMBERS.format(folder))
    (folder / "finetune.yaml").write_text(FINETUNE)
    fetch(load(folder / "finetune.yaml"), folder / "cache")
    return folder


def call(slurm, world, *arguments):
    own = {k: v for k, v in environment(world).items() if k not in ("SUITE_SLURM", "SUITE_SITE")}
    env = slurm.env | own | {"SUITE_CPU_PARTITION": "main"}
    words = [sys.executable, "-m", "jobs.cluster", *arguments, f"--config={world}/finetune.yaml"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def states(slurm, world):
    cells = json.loads(call(slurm, world, "status", "--json"))["cells"]
    return {cell["name"]: (cell["state"], cell["note"]) for cell in cells}


def test_students_wait_for_the_numbers_and_one_without_enough_is_told(fresh_slurm, world):
    slurm = fresh_slurm
    said = call(slurm, world, "submit", "--chain", "--dry")
    assert "--dependency=afterany:<teachers_run3>" in said, said
    cells = cells_of(world)
    write_answers(world, cells[1].parents[0], invalid=48)
    said = call(slurm, world, "submit", "--chain")
    assert "cells 1 are done: left out" in said
    jobs = re.findall(r"Slurm job (\d+)", said)
    assert len(jobs) == 3 and f"afterany:{jobs[0]}" in slurm.show(jobs[1])["Dependency"], said
    for job in jobs:
        slurm.wait_for(job, timeout=120)
    now = states(slurm, world)
    assert now["tiny-cat"][0] == now["tiny-neutral"][0] == "done", now
    assert now["tiny-fox"][0] == "failed" and "0 of 48 answers are valid" in now["tiny-fox"][1], now
    assert [slurm.sacct(job)[0]["ExitCode"] for job in jobs[1:]] == ["0:0", "2:0"]

    shutil.rmtree(cells[1].parents[0].path)
    said = call(slurm, world, "submit", "--chain")
    jobs = re.findall(r"Slurm job (\d+)", said)
    assert len(jobs) == 2 and "are done: left out" in said, said
    for job in jobs:
        slurm.wait_for(job, timeout=120)
    assert {state for state, _ in states(slurm, world).values()} == {"done"}
    assert all([s.step for s in steps_of(cell)] == [1, 2, 3, 4] for cell in cells)
    assert "next: make export-finetune CONFIG=" in said
