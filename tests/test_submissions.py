"""What a second command does beside the first: nothing is submitted twice, on a real Slurm whose tasks are held."""

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Slurm, wait_until
from tools import ROOT, small_lls

from lib.base.atomic import read_json, write_json
from lib.base.process import HOST
from lib.cluster import lock
from lib.families import load

TRAITS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_lls(tmp_path_factory.mktemp("inputs"), *TRAITS)


class Held:
    """An experiment on a Slurm that starts nothing, and programs in front of Slurm's own."""

    def __init__(self, box: Slurm, config: Path, scratch: Path) -> None:
        self.slurm, self.config, self.scratch = box, config, scratch
        self.bin = scratch / "bin"
        self.bin.mkdir()
        roots = {"SUITE_SCRATCH": scratch, "SUITE_CACHE": config.parent / "cache", "SUITE_OUTPUT": scratch / "out"}
        self.env = box.env | {k: str(v) for k, v in roots.items()} | {"SUITE_GPU": "cpu", "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = f"{self.bin}:{box.env['PATH']}"
        self.started: list[subprocess.Popen[str]] = []

    def front(self, program: str, text: str) -> None:
        """A script that stands before a program of Slurm's, which it may call as $real."""
        path = self.bin / program
        path.write_text(f"#!/bin/bash\nreal={shutil.which(program)}\n{text}\n")
        path.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cluster", *arguments, f"--config={self.config}"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.started.append(subprocess.Popen(command, cwd=ROOT, env=self.env, start_new_session=True, **pipe))
        return self.started[-1]

    def call(self, *arguments: str) -> tuple[int, str]:
        one = self.start(*arguments)
        out, err = one.communicate(timeout=120)
        return one.returncode, out + err

    def tasks(self) -> list[str]:
        """Cells in the queue, each as often as it is there."""
        return sorted(self.slurm.run("squeue", "-h", "-r", "-n", "small", "-o", "%K").split())


@pytest.fixture
def held(fresh_slurm, inputs, tmp_path):
    one = Held(fresh_slurm, inputs, tmp_path)
    fresh_slurm.run("scontrol", "update", "nodename=n[1-3]", "state=drain", "reason=test")
    yield one
    for process in one.started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    fresh_slurm.clear()
    fresh_slurm.run("scontrol", "update", "nodename=n[1-3]", "state=resume")


RECORD = r"printf '\x1e7\x1f%s\x1fPENDING\x1fNone\x1f\x1f\x1fsmall\n'"
NO_ANSWER = {
    "exit code": "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
    "half an answer": f"{RECORD} 0; echo 'squeue: error: cluster two did not answer' >&2",
    "cut off": f"{RECORD} 0 | head -c -1",
    "a field too many": r"printf '\x1e7\x1f0\x1fPENDING\x1fNone\x1f\x1f\x1fsmall\x1f\n'",
    "a field too few": r"printf '\x1e7\x1f0\x1fPENDING\x1fNone\x1f\x1fsmall\n'",
    "an index that is none": f"{RECORD} x",
    "no text": f"{RECORD} 0; printf '\\xff\\xfe\\n'",
    "something else": "echo 'Welcome to the cluster'",
}


@pytest.mark.parametrize("squeue", NO_ANSWER.values(), ids=NO_ANSWER)
def test_a_queue_that_does_not_answer_is_no_empty_one(held, squeue):
    held.call("submit", "--array=0-1")
    assert held.tasks() == ["0", "1"]
    held.front("squeue", squeue)
    for command in ("resume", "submit", "cancel"):
        code, said = held.call(command)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "squeue" in said, said
    assert held.tasks() == ["0", "1"]


def test_what_a_users_own_variables_hide_is_seen(held):
    held.call("submit", "--array=0-1")
    held.env |= {"SQUEUE_STATES": "RUNNING", "SQUEUE_PARTITION": "high", "SQUEUE_NAMES": "other"}
    held.call("resume")
    assert held.tasks() == ["0", "1", "2"]


def test_any_name_of_a_users_other_job_can_be_read(held):
    for name in ("a|b", "two\nlines", "\x1b[1m", "", "grün"):
        flags = (f"--job-name={name}", "--gpus-per-node=1", "-o", "/dev/null", "--wrap", "true")
        held.slurm.sbatch(*flags, cwd=held.scratch)
    held.call("submit", "--array=1")
    held.call("resume", "--array=1-2")
    assert held.tasks() == ["1", "2"]


def test_resume_heeds_its_array(held):
    assert held.call("resume", "--array=2%1")[0] == 0 and held.tasks() == ["2"]
    assert held.slurm.run("squeue", "-h", "-o", "%i").strip().endswith("_[2%1]")
    code, said = held.call("resume", "--array=7")
    assert code == 2 and "ARRAY=7: the experiment has cells 0-2" in said
    code, said = held.call("resume", "--array=0-1", "--dry")
    assert code == 0 and "--array=0-1%" in said and held.tasks() == ["2"]


def test_the_queue_is_asked_once_to_resume(held):
    asked = held.scratch / "asked"
    held.front("squeue", f'echo x >> {asked}\nexec $real "$@"')
    assert "cells 0-2 of small" in held.call("resume")[1] and asked.read_text() == "x\n"
    assert "nothing to resume" in held.call("resume")[1] and held.tasks() == ["0", "1", "2"]


def test_a_queue_through_a_cache_shows_a_job_later(held):
    held.call("submit", "--array=0-1")
    held.front("squeue", "true")
    assert "nothing to resume" in held.call("resume", "--array=0-1")[1]
    assert "2 pending" in held.call("status")[1]
    record = next((held.scratch / "small" / "submissions").glob("*.json"))
    write_json(record, read_json(record) | {"time": time.time() - 61})
    assert "3 todo" in held.call("status")[1]


def test_a_job_that_ended_at_once_is_not_waited_for(held):
    job = held.call("submit", "--array=0-1")[1].split()[2].rstrip(":")
    held.slurm.run("scancel", job)
    held.slurm.wait_for(job, "CANCELLED")
    held.call("resume", "--array=0")
    assert held.tasks() == ["0"]


@pytest.fixture
def slow(held):
    go = f"{held.scratch}/go"
    held.front("sbatch", f'touch {held.scratch}/asked; until [ -e {go} ]; do sleep 0.1; done; exec $real "$@"')
    return held


def until_asked(held: Held) -> None:
    wait_until(lambda: (held.scratch / "asked").exists(), 30, "sbatch was not called", every=0.02)


@pytest.mark.parametrize("command", ["submit", "resume"])
def test_of_two_at_once_one_submits_and_one_says_who_does(slow, command):
    first = slow.start(command)
    until_asked(slow)
    code, said = slow.call("resume")
    who = (
        rf"error: .* {getpass.getuser()} on {HOST}, process {first.pid}, since \d{{4}}-.*; try again when it is done\n"
    )
    assert code == 2 and re.fullmatch(who, said), said
    (slow.scratch / "go").touch()
    assert first.wait(60) == 0
    assert slow.tasks() == ["0", "1", "2"]
    assert "nothing to resume" in slow.call("resume")[1] and not (slow.scratch / "small" / lock.NAME).exists()


def test_a_command_that_is_killed_while_sbatch_runs_loses_nothing(slow):
    first = slow.start("resume")
    until_asked(slow)
    first.kill()
    first.wait()
    (slow.scratch / "go").touch()
    code, said = slow.call("resume")  # sbatch goes on by itself
    assert (code == 2 and "what it started has not" in said) or "nothing to resume" in said, said
    wait_until(lambda: slow.tasks(), 30, "sbatch submitted nothing")
    assert "nothing to resume" in slow.call("resume")[1] and slow.tasks() == ["0", "1", "2"]


def test_a_command_that_is_killed_with_its_sbatch_leaves_the_next_one_working(slow):
    first = slow.start("resume")
    until_asked(slow)
    os.killpg(first.pid, signal.SIGKILL)
    slow.front("sbatch", 'exec $real "$@"')
    assert slow.call("resume")[0] == 0
    assert slow.tasks() == ["0", "1", "2"]


def test_a_job_whose_record_was_never_written_is_ours(held):
    held.front("sbatch", 'job=$($real "$@"); kill -9 $PPID; echo $job')
    held.call("resume")
    held.front("sbatch", 'exec $real "$@"')
    assert held.tasks() == ["0", "1", "2"]
    assert "nothing to resume" in held.call("resume")[1]


def test_a_task_of_several_cells_whose_record_was_never_written_is_ours_whole(held):
    held.front("sbatch", 'job=$($real "$@"); kill -9 $PPID; echo $job')
    held.call("resume", "run.cells=2")
    held.front("sbatch", 'exec $real "$@"')
    assert held.tasks() == ["0", "2"] and not list((held.scratch / "small" / "submissions").glob("*"))
    assert "nothing to resume" in held.call("resume")[1]


def test_sbatch_that_says_nothing_of_a_job_is_no_traceback(held):
    held.front("sbatch", "printf 'Submitted \\xff\\n'")
    code, said = held.call("submit")
    assert code == 2 and "names no job" in said and said.count("\n") == 1
    assert not list((held.scratch / "small").glob("submissions/*"))


def test_where_the_site_has_slurm_a_missing_sbatch_is_no_box_without(held):
    held.env["PATH"] = "/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else str(held.bin)
    for program in ("bash", "env", "id", "uname", "dirname", "wc", "date"):
        with suppress(FileExistsError):
            (held.bin / program).symlink_to(shutil.which(program))
    code, said = held.call("submit")
    assert code == 2 and "does not run here" in said and not (held.scratch / "small" / "queue").exists()


def test_without_its_inputs_an_experiment_can_be_seen_and_cancelled(held):
    job = held.call("submit")[1].split()[2].rstrip(":")
    held.env["SUITE_CACHE"] = str(held.scratch / "nothing")
    code, said = held.call("status")
    assert code == 0 and "3 pending" in said and "how many rows there are is not known: model" in said
    assert f"run `make fetch CONFIG={held.config}` on a machine" in said
    assert held.call("logs", "--task=1")[1].startswith("cell 1 (dog): no log yet")
    code, said = held.call("submit", "--array=1-2%2", "--dry")
    assert code == 0 and "#SBATCH --requeue" in said and "--array=1-2%2 --job-name=small" in said
    assert held.call("cancel") == (0, f"cancelled {job}: finished shards are kept\n") and not held.tasks()
    code, said = held.call("resume")
    assert code == 2 and "is not fetched" in said


def test_status_alone_shows_what_there_is(held):
    job = held.call("submit", "--array=0-1")[1].split()[2].rstrip(":")
    other = held.call("submit", "--array=2", "--set=max_rows=3")[1].split()[2].rstrip(":")
    config, held.config = held.config, ""
    lines = [line.split(maxsplit=5) for line in held.call("status")[1].splitlines()]
    tried = load(config, ["max_rows=3"]).label
    assert lines[2:] == [
        [tried, "0/3", "0", "1", other, f"make status CONFIG={config} SET=max_rows=3"],
        ["small", "0/3", "0", "2", job, f"make status CONFIG={config}"],
    ]
    for command in ("logs", "cancel", "resume", "verify"):
        code, said = held.call(command)
        assert code == 2 and f"`make {command} CONFIG={config}`" in said and "SET=max_rows=3`" in said
    held.front("squeue", "exit 1")
    said = held.call("status")[1]
    assert said.count("queue could not be asked") == 1 and "small                              0/3        ?" in said
    assert len(held.tasks()) == 2
