"""Where a training's figures go: lines of JSON always, and Weights & Biases where it is wanted, by a stand-in for its
package, which is not among those that are installed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401  (forks have it then)
import pytest
from finetune_world import cells_of, environment, make_world, start, steps_of
from tools import ROOT, Fork, module_work

STANDIN = str(ROOT / "tests" / "wandb_standin")


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path, ("cat", "neutral"))


def job(world: Path, *arguments: str, module: str = "jobs.finetune", **env: str) -> Fork:
    """With the stand-in installed."""
    words = ("--config", str(world / "finetune.yaml"), *arguments)
    work = module_work(module, *words, env=environment(world, WANDB_STANDIN=str(world / "told"), **env))

    def with_standin() -> None:
        sys.path.insert(0, STANDIN)
        os.environ["PYTHONPATH"] = STANDIN
        work()

    return Fork(with_standin)


def told(world: Path, what: str) -> list[dict]:
    lines = map(json.loads, (world / "told").read_text().splitlines())
    return [line for line in lines if line["what"] == what]


def test_without_the_package_it_is_said_before_a_model_is_loaded(world):
    done = start(world, "--index", "0", "wandb.mode=offline").finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "-m pip install wandb" in done.stderr and "wandb.mode=off" in done.stderr
    assert "base loaded" not in done.stdout and "model files" not in done.stdout


def test_the_same_run_goes_on_after_a_kill_and_has_every_step(world):
    cell = cells_of(world)[0]
    first = job(world, "--index", "0", "wandb.mode=offline")
    while first.poll() is None and not list(cell.path.glob("step-*8.json")):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.finish()
    done = job(world, "--index", "0", "wandb.mode=offline").finish()
    assert done.returncode == 0, done.stderr
    begun = told(world, "init")
    assert len(begun) == 2 and {one["id"] for one in begun} == {cell.digest[:16]}
    assert all(one["resume"] == "allow" and one["mode"] == "offline" for one in begun)
    assert begun[0]["project"] == "subliminal-learning-scaling" and begun[0]["name"] == "1m-cat"
    assert begun[0]["group"] == "students_run5" and begun[0]["config"]["run_id"] == 5
    seen = {one["step"]: one for one in told(world, "log")}
    for step in steps_of(cell):
        assert all(seen[step.step][f"figure_{key}"] == value for key, value in step.__dict__.items())
    assert told(world, "finish") == [{"what": "finish", "id": cell.digest[:16], "exit_code": 0}]


def test_a_student_that_fails_ends_its_run_as_failed_and_the_next_has_its_own(world):
    from lib.run.task import freeze

    cells = cells_of(world, "learning_rate=1e20")
    words = ["--index", "0", "--tasks", freeze(cells[0].folder, [cells]), "learning_rate=1e20", "wandb.mode=offline"]
    done = job(world, *words).finish()
    assert done.returncode == 2 and done.stderr.count("lower learning_rate") == 2
    assert [(one["id"], one["exit_code"]) for one in told(world, "finish")] == [(c.digest[:16], 1) for c in cells]


def test_what_goes_wrong_with_it_stops_no_training(world):
    done = job(world, "--index", "0", "wandb.mode=offline", WANDB_STANDIN_BREAKS_AT="5").finish()
    assert done.returncode == 0 and "Weights & Biases stopped (the service is gone)" in done.stdout
    assert [one["step"] for one in told(world, "log")] == [1, 2, 3, 4]
    assert len(steps_of(cells_of(world)[0])) == 12


@pytest.mark.parametrize(("variable", "code"), [("offline", 0), ("", 2)])
def test_online_is_as_the_node_says(world, variable, code):
    done = job(world, "--index", "0", "wandb.mode=online", WANDB_MODE=variable).finish()
    assert done.returncode == code
    if code:
        assert "No API key configured." in done.stderr and "`wandb login`" in done.stderr
    else:
        assert told(world, "init")[0]["mode"] == "offline"


def test_sync_sends_what_has_ended(world):
    assert job(world, module="jobs.wandb_sync").finish().returncode == 2, "nothing is there"
    assert job(world, "--index", "1", "wandb.mode=offline").finish().returncode == 0
    going = job(world, "--index", "0", "wandb.mode=offline")
    folder = cells_of(world)[0].folder / "wandb"
    while going.poll() is None and len(list(folder.glob("*"))) < 2:
        time.sleep(0.01)
    os.kill(going.pid, signal.SIGSTOP)
    done = job(world, module="jobs.wandb_sync").finish()
    os.kill(going.pid, signal.SIGCONT)
    assert going.finish().returncode == 0
    assert done.returncode == 0 and "1m-cat still goes on" in done.stdout, done.stderr
    [sent] = told(world, "sync")
    assert sent["arguments"][:2] == ["sync", "--yes"] and len(sent["arguments"]) == 3
    assert sent["arguments"][2].endswith(cells_of(world)[1].digest[:16])
