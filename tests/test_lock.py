"""One command at a time on an experiment: the lock by itself, and two that would start workers of this box."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import local_logs, wait_until
from test_submissions import TRAITS, Held
from tools import ROOT, small_lls

from lib.base.atomic import read_json, write_json
from lib.base.errors import UserError
from lib.cluster import lock


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_lls(tmp_path_factory.mktemp("inputs"), *TRAITS)


@pytest.fixture
def alone(inputs, tmp_path):
    """The same commands on a box without Slurm; what was started is cancelled."""
    one = object.__new__(Held)
    one.config, one.scratch, one.started = inputs, tmp_path, []
    roots = {"SUITE_SCRATCH": tmp_path, "SUITE_CACHE": inputs.parent / "cache", "SUITE_OUTPUT": tmp_path / "out"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUITE_"))}
    one.env = clean | {k: str(v) for k, v in roots.items()} | {"SUITE_SITE": "local", "SUITE_SLURM": "no"}
    one.env |= {"SUITE_THROTTLE": "1", "OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}
    with local_logs(tmp_path):
        yield one
        one.call("cancel")
        wait_until(lambda: "nothing is queued" in one.call("cancel")[1], 60, "workers go on", every=1)


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
