"""Steps under fire: kill -9, signals, two copies at once, a requeue on a real Slurm; the end is the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import wait_until
from numpy_steps import Sgd, cell_in, in_one_go
from test_folders import rewrite
from test_store import in_small_mount
from tools import ROOT

from lib.cluster.status import status
from lib.run.extent import extent, states, step_of
from lib.store import commit_folder, retire, scan_folders

JOB = ROOT / "tests" / "numpy_steps.py"


def start(folder: Path, **env: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(JOB), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = job.communicate(timeout=120)
    return job.returncode, out


def markers(folder: Path, index: int = 0) -> int:
    return len(list(cell_in(folder, index).path.glob("step-*.json")))


def last_state(folder: Path, index: int = 0, steps: int = 60) -> dict[str, bytes]:
    """The files of the newest state, once every byte was looked at."""
    done, bad = scan_folders(cell_in(folder, index).path, cell_in(folder).digest, deep=True)
    piece = [state for state in states(cell_in(folder, index, steps), done) if not state.retired][-1]
    assert bad == []
    return {one.path: (piece.folder / one.path).read_bytes() for one in piece.files}


def undisturbed(tmp: Path, index: int = 0, steps: int = 60) -> dict[str, bytes]:
    """The same work outside of the suite."""
    tmp.mkdir(parents=True)
    in_one_go(index, steps).snapshot()(tmp)
    return {path.relative_to(tmp).as_posix(): path.read_bytes() for path in sorted(tmp.rglob("*")) if path.is_file()}


def words(folder: Path) -> list[str]:
    return [json.loads(p.read_text())["state"] for p in sorted((folder / "run" / "tasks").glob("[!.]*.json"))]


def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path):
    dice, resumed = random.Random(11), set()
    for _ in range(9):
        job = start(tmp_path, STEP_SECONDS=0.02, EVERY=dice.choice([3, 4, 7]), STEPS=200)
        before = markers(tmp_path)
        wait_until(lambda before=before: markers(tmp_path) > before, 15, "no state", 0.005)
        time.sleep(dice.uniform(0, 0.15))
        assert job.poll() is None, "the job was too quick to be killed"
        job.kill()
        resumed.add(re.search(r"(\d+) of 200 steps done", finish(job)[1])[1])
    assert len(resumed) == 9, "each went on from a later state"
    code, out = finish(start(tmp_path, EVERY=5, STEPS=200))
    assert code == 0, out
    assert last_state(tmp_path, steps=200) == undisturbed(tmp_path / "alone", steps=200)
    assert not list(cell_in(tmp_path).path.glob(".tmp-*"))
    cell = cell_in(tmp_path)
    marked = {piece.folder.name for piece in scan_folders(cell.path, cell.digest)[0]}
    assert len(marked & {path.name for path in cell.path.iterdir()}) == 1, "older states are gone"
    for orphan in cell.path.glob("step-*/"):  # of a kill before the marker
        os.utime(orphan, (0, 0))
    (cell.path / "step-00000007-0123456789").mkdir()
    os.utime(cell.path / "step-00000007-0123456789", (0, 0))
    assert finish(start(tmp_path, EVERY=5, STEPS=205))[0] == 0
    assert [path.name for path in cell.path.glob("step-*/")] == [max(one.name for one in cell.path.glob("step-*/"))]


def test_the_warning_commits_the_step_in_hand_and_asks_for_a_requeue(tmp_path):
    job = start(tmp_path, STEP_SECONDS=0.05, EVERY=1000)
    wait_until(lambda: "running" in words(tmp_path), 15, "it did not start", 0.02)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    code, out = finish(job)
    assert code == 75 and "stopping after this step" in out and words(tmp_path) == ["requeue"]
    [state] = scan_folders(cell_in(tmp_path).path, cell_in(tmp_path).digest, deep=True)[0]
    assert 0 < step_of(state) < 60 and state.facts["examples"] == 4 * step_of(state)
    code, out = finish(start(tmp_path, EVERY=1000))
    assert code == 0 and f"{step_of(state)} of 60 steps done" in out
    assert f"in all: examples {4 * (60 - step_of(state))}" in out and "optimizer" not in out
    assert last_state(tmp_path) == undisturbed(tmp_path / "alone")


def test_a_termination_stops_at_once_and_keeps_the_state_before(tmp_path):
    job = start(tmp_path, STEP_SECONDS=0.1, EVERY=2)
    wait_until(lambda: markers(tmp_path) >= 1, 15, "no state", 0.01)
    job.send_signal(signal.SIGTERM)
    code, out = finish(job)
    assert code == 143 and "stopped by SIGTERM: committed states are kept" in out and words(tmp_path) == ["terminated"]
    assert finish(start(tmp_path))[0] == 0
    assert last_state(tmp_path) == undisturbed(tmp_path / "alone")


def test_two_copies_at_once_both_end_well(tmp_path):
    jobs = [start(tmp_path, STEP_SECONDS=0.005 * i, EVERY=every) for i, every in enumerate((10, 10, 7))]
    ended = [finish(job) for job in jobs]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert last_state(tmp_path) == undisturbed(tmp_path / "alone")


def test_who_comes_second_to_sampled_steps_goes_on_from_the_first_ones_state(tmp_path):
    """Each process trains on other rows; all states must be one process's, or continue it."""
    jobs = [start(tmp_path, STEP_SECONDS=0.01, SAMPLED=1, KEEP="all") for _ in range(3)]
    ended = [finish(job) for job in jobs]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert "another copy was first with other bits" in "".join(out for _, out in ended)
    done, bad = scan_folders(cell_in(tmp_path).path, cell_in(tmp_path).digest, deep=True)
    assert bad == [] and [step_of(state) for state in done] == [10, 20, 30, 40, 50, 60]
    for before, after in pairwise(done):  # the state of its dice is in what it saved
        kernel = Sgd(0)
        kernel.restore(before.folder, step_of(before))
        random_states = json.loads((after.folder / "random.json").read_text())["state"]
        assert kernel.dice.bit_generator.state["state"]["inc"] == random_states["inc"], "one stream"
    first = last_state(tmp_path)
    assert finish(start(tmp_path, SAMPLED=1))[0] == 0 and last_state(tmp_path) == first


KEEPS = {"all": [10, 20, 30, 40, 50, 60], "last": [60], "[7, 20]": [7, 20, 60], "[]": [60]}


@pytest.mark.parametrize("keep", KEEPS)
def test_states_that_are_kept(tmp_path, keep):
    job = start(tmp_path, KEEP=keep, STEP_SECONDS=0.01)
    time.sleep(1)
    job.send_signal(signal.SIGUSR1)  # leaves a state between those that are wanted, or comes too late
    finish(job)
    assert finish(start(tmp_path, KEEP=keep))[0] == 0
    done, bad = scan_folders(cell_in(tmp_path).path, cell_in(tmp_path).digest, deep=True)
    assert bad == [] and [step_of(state) for state in done if not state.retired] == KEEPS[keep]
    assert sorted(p.name for p in cell_in(tmp_path).path.glob("step-*/")) == [
        s.folder.name for s in done if not s.retired
    ]
    assert {s.retired.why for s in done if s.retired} <= {"a later state holds"}
    assert sum(s.facts["examples"] for s in done) == 240, "facts of what was retired are kept"


def test_a_broken_last_state_is_said_and_the_one_before_goes_on(tmp_path):
    assert finish(start(tmp_path, KEEP="all"))[0] == 0
    done, _ = scan_folders(cell_in(tmp_path).path, cell_in(tmp_path).digest)
    for state in done[-2:]:
        (state.folder / "weights.npy").write_bytes((state.folder / "weights.npy").read_bytes()[:-1] + b"x")
    code, out = finish(start(tmp_path))
    assert code == 0 and "step-00000060 does not hold: " in out and "40 of 60 steps done" in out
    assert last_state(tmp_path) == undisturbed(tmp_path / "alone")


def test_status_counts_steps_and_a_last_state_retired_on_purpose_stays_done(tmp_path):
    cell = cell_in(tmp_path)
    job = start(tmp_path, STEP_SECONDS=0.05, EVERY=5)
    wait_until(lambda: markers(tmp_path) >= 3, 15, "no state", 0.01)
    job.kill()
    finish(job)
    now = status("run", [cell]).cells[0]
    assert (now.state, now.done % 5, now.rows, now.broken) == ("stale", 0, 60, 0) and 15 <= now.done < 60
    assert 3 < now.rows_per_s < 20 and "retired" not in now.note
    assert finish(start(tmp_path))[0] == 0
    assert status("run", [cell]).cells[0].state == "done"
    [last] = [s for s in scan_folders(cell.path, cell.digest)[0] if not s.retired]
    retire(last, "judged and exported", "preferences/cat")
    now = status("run", [cell]).cells[0]
    assert now.state == "done" and now.note == "1 retired: judged and exported (read by preferences/cat)"
    assert extent(cell, deep=True).left == []
    code, out = finish(start(tmp_path))
    assert code == 0 and "60 of 60 steps done" in out and not last.folder.exists()


def test_a_state_that_lies_is_not_gone_on_from(tmp_path):
    """A whole folder of another experiment, or under another step's name."""
    cell = cell_in(tmp_path)
    commit_folder(cell.path, "cd" * 32, "step-00000050", in_one_go(0, 50).snapshot())
    commit_folder(cell.path, cell.digest, "step-00000061", in_one_go(0, 50).snapshot())  # the cell has 60
    piece = commit_folder(cell.path, cell.digest, "step-00000040", in_one_go(0, 40).snapshot())
    rewrite(piece.path, name="step-00000030")
    code, out = finish(start(tmp_path))
    assert code == 0 and "0 of 60 steps done" in out and out.count("does not hold") == 2
    assert last_state(tmp_path) == undisturbed(tmp_path / "alone")


def test_a_disk_that_fills_up_ends_the_job_in_one_sentence_and_it_goes_on_later(tmp_path):
    job = f"subprocess.run([sys.executable, '{JOB}', '{tmp_path}/x'], env=os.environ | {{'KEEP': 'all'}})"
    code = f"import os, subprocess, sys; print('rc', {job}.returncode); os.environ['STEPS'] = '60'; "
    code += f"print(len([p for p in os.listdir('{tmp_path}/x/run/cells/sgd-0-5a5a5a5a') if p.endswith('.json')]))"
    done = in_small_mount(tmp_path, "size=60k", code)
    assert "No space left on device" in done.stderr and "`make resume` goes on" in done.stderr, done.stderr
    assert done.stdout.splitlines()[-2] == "rc 2" and 1 <= int(done.stdout.splitlines()[-1]) < 6


SCRIPT = """#!/bin/bash
#SBATCH --requeue --open-mode=append --array=0-1 --output={folder}/log-%a.txt --time=5 --gpus-per-node=1
exec {python} {job} {folder}
"""


def test_an_array_of_which_one_is_requeued_ends_with_the_bytes_of_an_undisturbed_run(fresh_slurm, tmp_path):
    (tmp_path / "job.sbatch").write_text(SCRIPT.format(folder=tmp_path, python=sys.executable, job=JOB))
    env = {"STEP_SECONDS": "0.1", "EVERY": "7", "OMP_NUM_THREADS": "1"}
    job = fresh_slurm.sbatch(tmp_path / "job.sbatch", cwd=ROOT, **env)
    wait_until(lambda: markers(tmp_path, 1) >= 2, 60, lambda: fresh_slurm.run("squeue"))
    fresh_slurm.run("scontrol", "requeue", f"{job}_1")
    fresh_slurm.wait_for(job, "COMPLETED", timeout=120)
    for index in (0, 1):
        assert last_state(tmp_path, index) == undisturbed(tmp_path / f"alone-{index}", index)
    starts = re.findall(r"(\d+) of 60 steps done", (tmp_path / "log-1.txt").read_text())
    assert len(starts) == 2 and starts[0] == "0" and int(starts[1]) >= 14
    assert "stopped by SIGTERM" in (tmp_path / "log-1.txt").read_text()
