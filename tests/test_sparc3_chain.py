"""SparC3 whole on a real Slurm, by one command: its stages wait for each other, one that fails is told, and the report
comes all the same."""

import json
import re
import subprocess
import sys

import pytest
from sparc3_world import configure, fetched, make_world, roots
from tools import ROOT

from lib.demo.speaker import Speaking
from lib.families import load

SELECTION = "selection.set=['methods=[lrp, gradient, random]', 'seeds=false', 'draws=1']"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("sparc3"), Speaking(steps=20))
    configure(folder, folder)
    path = folder / "attribution.yaml"
    path.write_text(path.read_text().replace("shard_rows: 16", "cells: 4, shard_rows: 16"))
    return fetched(folder, SELECTION)


def call(slurm, world, *arguments, of="sweep"):
    env = slurm.env | {k: v for k, v in roots(world).items() if k != "SUITE_SLURM"} | {"SUITE_CPU_PARTITION": "main"}
    words = [sys.executable, "-m", "jobs.cluster", *arguments, f"--config={world}/{of}.yaml"]
    words += [SELECTION] if of == "sweep" else []
    done = subprocess.run(words, cwd=ROOT, env=env | {"SUITE_GPU": "cpu"}, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def status(slurm, world):
    cells = json.loads(call(slurm, world, "status", "--json"))["cells"]
    return {cell["name"]: (cell["state"], cell["note"]) for cell in cells}


def test_one_command_runs_all_stages_and_the_report_tells_what_failed(fresh_slurm, world):
    slurm = fresh_slurm
    said = call(slurm, world, "submit", "--chain", "--dry")
    for before in ("speaking>", "speaking-", "choosing-", "sweeping-"):
        assert f"--dependency=afterany:<{before}" in said, said
    assert "slurm/sparc3_report.sbatch" in said
    assert re.search(r"a setting: \S+ s \(perplexity \S+, completions \S+, judges \S+\), 7 settings", said)
    assert not slurm.run("squeue", "-h") and not (world / "scratch/choosing").exists()

    sweep = load(world / "sweep.yaml", [SELECTION])
    gradient = next(stage.experiment for stage in sweep.stages() if "gradient" in " ".join(stage.overrides))
    broken = next(c for c in gradient.cells(world / "cache", world / "scratch") if c.name == "general-1").path
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    said = call(slurm, world, "submit", "--chain")
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_text("in the way")  # of one attribution's folder
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    jobs = re.findall(r"Slurm job (\d+)", said)
    assert len(jobs) == 10, said  # two attributions; of selection and sweep one for each that they wait for; report
    assert f"afterany:{jobs[-2]}" in slurm.show(jobs[-1])["Dependency"]
    for job in jobs:
        slurm.wait_for(job, timeout=240)
    states = {
        cell["name"]: (cell["state"], cell["note"])
        for cell in json.loads(call(slurm, world, "status", "--json"))["cells"]
    }
    assert states["dense"][0] == states["lrp"][0] == states["random-0"][0] == "done"
    assert states["gradient"][0] == "blocked" and "choosing" in states["gradient"][1]
    text = (world / "output" / sweep.label / "report/report.txt").read_text()
    assert "== Missing" in text and "gradient" in text.split("== Missing")[1]
    assert (world / "output" / sweep.label / "selection/lrp.csv").exists()

    broken.unlink()
    said = call(slurm, world, "submit", "--chain")
    jobs = re.findall(r"Slurm job (\d+)", said)
    assert len(jobs) == 4 and "are done: left out" in said, said  # what of each stage is missing, and the report
    for job in jobs:
        slurm.wait_for(job, timeout=240)
    assert {state for state, _ in status(slurm, world).values()} == {"done"}
    assert "== Missing" not in (world / "output" / sweep.label / "report/report.txt").read_text()
    assert "nothing to submit" in call(slurm, world, "submit", "--chain")
    said = call(slurm, world, "submit", "--chain", of="attribution")  # whose results no job shows
    assert "are done: left out" in said and "next: make export-attributions CONFIG=" in said
