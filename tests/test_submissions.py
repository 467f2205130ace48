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
from lib.base.errors import UserError
from lib.base.process import HOST
from lib.cluster import command as front
from lib.cluster import lock, slurm
from lib.cluster.send import Request
from lib.cluster.status import status
from lib.families import load
from lib.run.heartbeat import Heartbeat

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


# Without a Slurm: local workers, what is read, and the lock by itself.


@pytest.fixture
def alone(inputs, tmp_path):
    """The same commands on a box without Slurm; what was started is cancelled."""
    one = object.__new__(Held)
    one.config, one.scratch, one.started = inputs, tmp_path, []
    roots = {"SUITE_SCRATCH": tmp_path, "SUITE_CACHE": inputs.parent / "cache", "SUITE_OUTPUT": tmp_path / "out"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUITE_"))}
    one.env = clean | {k: str(v) for k, v in roots.items()} | {"SUITE_SITE": "local", "SUITE_SLURM": "no"}
    one.env |= {"SUITE_THROTTLE": "1", "OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}
    before = set((ROOT / "slurm" / "logs").iterdir())
    yield one
    one.call("cancel")
    wait_until(lambda: "nothing is queued" in one.call("cancel")[1], 60, "workers go on")
    for path in set((ROOT / "slurm" / "logs").iterdir()) - before:
        path.unlink()


def queues(one: Held) -> list[Path]:
    return list((one.scratch / "small" / "queue").glob("local-*/plan.json"))


def test_of_two_at_once_one_starts_workers(alone):
    both = [alone.start("submit"), alone.start("submit")]
    said = ["".join(one.communicate()) for one in both]
    assert len(queues(alone)) == 1, said
    refused = "is being submitted by", "nothing to submit"
    assert (
        sum("no Slurm here: local workers" in s for s in said) == sum(any(r in s for r in refused) for s in said) == 1
    )


def test_workers_of_a_command_that_was_killed_are_not_started_again(alone):
    first = alone.start("submit")
    wait_until(lambda: queues(alone), 60, "nothing was started", every=0.005)
    first.kill()
    first.wait()
    alone.call("submit")
    found = (alone.scratch / "small" / "queue").glob
    wait_until(lambda: list(found("local-*/dispatcher.json")), 60, "no workers")
    assert "nothing to submit" in alone.call("submit")[1]
    assert len(list(found("local-*/dispatcher.json"))) == 1


def test_a_squeue_that_hangs_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="squeue gave no answer in 1 s"):
        slurm.ask("squeue", timeout=1)


@pytest.mark.parametrize(
    "text", ["7_0|RUNNING", "7_0||1|||", "7_0|DONE|x||1.2.3K|0:0", "\x00|||||", "7_0.batch|R|1||1.2.3K|0"]
)
def test_nonsense_of_sacct_is_passed_over(text):
    good = "7_1|COMPLETED|5|gres/gpu=1||0:0"
    assert set(slurm.parse_sacct(f"{text}\n{good}\n")) == {"7_1"}


@pytest.fixture
def unanswered(inputs, tmp_path, monkeypatch):
    """The experiment in this process, its first cell at work by its own word, and a queue that cannot be asked."""
    experiment = load(inputs)
    cells = experiment.cells(inputs.parent / "cache", tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7"), monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    Heartbeat(tmp_path / "small" / "tasks", cells[0], 1).beat("running")
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    monkeypatch.setattr(slurm, "ask", lambda *command, timeout=0: (_ for _ in ()).throw(UserError(f"{command[0]}: no")))
    monkeypatch.setattr(Request, "cells", cells)
    here = front.site()
    return Request(experiment, inputs, [], here.__class__(**{**vars(here), "scratch": tmp_path}))


def test_a_task_that_nobody_can_be_asked_about_is_unknown(unanswered):
    now = status("small", unanswered.cells)
    assert (now.counts["unknown"], now.counts["stale"], now.queue_note) == (1, 0, "squeue: no")
    table = front.show.table(now, unanswered.spoken, ("submit-lls", "export-lls"))
    assert "unknown" in table and "stale" not in table and "resume" not in table


def test_watching_goes_on_while_the_queue_cannot_be_asked(unanswered, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(front.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        front._status(unanswered, as_json=False, watch=True, brief=True)
    assert len(slept) == 2


HOLD = """
import sys, time
from pathlib import Path
from lib.cluster import lock
from lib.base.errors import UserError
lock.SETTLE_SECONDS = 0.3
end = time.monotonic() + 8
while time.monotonic() < end:
    try:
        with lock.submitting(Path(sys.argv[1])):
            (Path(sys.argv[1]) / "inside").mkdir()
            time.sleep(0.2)
            (Path(sys.argv[1]) / "inside").rmdir()
        print("had it", flush=True)
        break
    except UserError as e:
        time.sleep(0.05)
"""


def test_a_lock_of_a_dead_process_passes_to_one_at_a_time(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", HOLD.replace("sleep(0.2)", "sleep(60)"), tmp_path], cwd=ROOT)
    wait_until(lambda: (tmp_path / "inside").exists(), 30, "no lock")
    dead.kill()  # not waited for: a zombie holds nothing either
    (tmp_path / "inside").rmdir()
    command = [sys.executable, "-c", HOLD, tmp_path]
    takers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(5)
    ]
    assert [one.communicate() for one in takers] == [("had it\n", "")] * 5
    dead.wait()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_never_removed(tmp_path, monkeypatch):
    path = tmp_path / lock.NAME
    with lock.submitting(tmp_path):
        held = read_json(path / "holder.json")
    for changed, says in [
        ({"host": "far"}, r"on far, process \d+, since .*; try again when it is done"),
        ({"host": "far", "since": time.time() - 7200}, f"that is long: if it has ended there, delete {path}"),
        ({"network": "net:[1]"}, "try again when it is done"),
    ]:
        write_json(path / "holder.json", held | changed)
        with pytest.raises(UserError, match=says), lock.submitting(tmp_path):
            pass
    assert read_json(path / "holder.json") == held | changed
    (path / "holder.json").unlink()
    (path / "something").touch()
    monkeypatch.setattr(lock, "TRIES", 2)
    with pytest.raises(UserError, match=f"{path} names nobody who holds it"), lock.submitting(tmp_path):
        pass
