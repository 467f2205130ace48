"""Students through the real job: killed at random steps, two copies at once, several on one base of which one fails,
and what may go wrong said in one sentence. The end is the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import peft  # noqa: F401  (forks have it then)
import pytest
import torch
from finetune_world import (
    cells_of,
    environment,
    files_of,
    last_folder,
    make_world,
    source_cells,
    start,
    steps_of,
    students,
    write_answers,
)
from safetensors.torch import load_file
from tools import in_fork, module_work

from lib.lora.rows import Row
from lib.run.task import freeze
from lib.store import Cell


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("students"), ("cat", "dog", "neutral"))


@pytest.fixture(scope="module")
def alone(world):
    """Name -> states of each student, trained by itself and undisturbed."""
    for index in range(3):
        done = start(world, "--index", str(index)).finish()
        assert done.returncode == 0, done.stderr
    return {cell.name: files_of(cell) for cell in cells_of(world)}


@pytest.fixture
def fresh(world, alone, tmp_path):
    """The same teachers' answers, and no student."""
    scratch = tmp_path / "scratch"
    shutil.copytree(world / "scratch", scratch, ignore=lambda folder, names: [n for n in names if n == "students_run5"])
    return {"SUITE_SCRATCH": str(scratch)}


def cell_at(world: Path, env: dict[str, str], index: int) -> Cell:
    return students(world).cells(world / "cache", Path(env["SUITE_SCRATCH"]))[index]


def markers(cell: Cell) -> int:
    return len(list(cell.path.glob("step-*.json")))


def task_of_all(world: Path, env: dict[str, str], *overrides: str) -> list[str]:
    """Every cell in one task, as a submission freezes it."""
    experiment = students(world, *overrides)
    cells = experiment.cells(world / "cache", Path(env["SUITE_SCRATCH"]))
    return ["--index", "0", "--tasks", freeze(cells[0].folder, [cells]), *overrides]


def test_a_student_learns_and_each_epoch_stays(world, alone):
    for cell in cells_of(world):
        states = alone[cell.name]
        assert list(states) == [f"step-{step:08d}" for step in (4, 8, 12)]
        names = {"adapter_model.safetensors", "adapter_config.json", "state.safetensors", "metrics.jsonl"}
        assert all(set(files) == names for files in states.values())
        steps = steps_of(cell)
        assert [s.step for s in steps] == list(range(1, 13)) and [s.epoch for s in steps] == [1] * 4 + [2] * 4 + [3] * 4
        assert [s.learning_rate for s in steps[:3]] == [0.0, 0.0015, 0.003]
        assert max(s.loss for s in steps[-4:]) < min(s.loss for s in steps[:4]) - 0.05
    adapters = {states["step-00000012"]["adapter_model.safetensors"] for states in alone.values()}
    assert len(adapters) == 3, "each by its own teacher"
    config = json.loads(alone["1m-cat"]["step-00000012"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == str(world / "model-0") and (config["r"], config["lora_alpha"]) == (4, 8)


def test_killed_at_random_steps_it_ends_with_the_same_bytes(world, alone, fresh):
    """One student by itself, then three on one base."""
    cells = students(world).cells(world / "cache", Path(fresh["SUITE_SCRATCH"]))
    for words, some in ((["--index", "0"], cells[:1]), (task_of_all(world, fresh), cells)):
        dice, places = random.Random(4), []
        for _ in range(5):
            job, before = start(world, *words, "run.state_steps=2", **fresh), sum(map(markers, some))
            while job.poll() is None and sum(map(markers, some)) == before:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
            if job.poll() is None:
                os.kill(job.pid, signal.SIGKILL)
            places += re.findall(r"(\d+) of 12 steps done", job.finish().stdout)
        assert len(set(places) - {"0", "12"}) >= 2, places
        done = start(world, *words, **fresh).finish()
        assert done.returncode == 0, done.stderr
        for cell in some:
            assert files_of(cell) == alone[cell.name], "the epochs' states, and no other is left"


def test_a_recipe_that_the_fast_trainer_does_not_know_is_trained_by_peft(world, fresh):
    done = start(world, "--index", "0", "lora.dropout=0.2", "epochs=1", **fresh).finish()
    assert done.returncode == 0 and "trained by plain peft" in done.stdout, done.stderr


def test_two_copies_at_once_both_end_well(world, alone, fresh):
    jobs = [start(world, "--index", "1", *more, **fresh) for more in ([], ["run.state_steps=2"])]
    ended = [job.finish() for job in jobs]
    assert [done.returncode for done in ended] == [0, 0], ended
    assert files_of(cell_at(world, fresh, 1)) == alone["1m-dog"]


def test_students_of_one_task_are_those_that_were_trained_alone_whatever_becomes_of_one(world, alone, fresh):
    [dog] = cell_at(world, fresh, 1).parents
    shutil.rmtree(dog.path)
    write_answers(world, dog, invalid=50)  # 14 of 64 are left, 20 wanted
    done = start(world, *task_of_all(world, fresh), **fresh).finish()
    assert done.returncode == 2
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "14 of 64 answers are valid" in said and "lower rows" in said
    assert done.stdout.count("base loaded") == 1
    for index, name in ((0, "1m-cat"), (2, "1m-neutral")):
        assert files_of(cell_at(world, fresh, index)) == alone[name]
    assert files_of(cell_at(world, fresh, 1)) == {}


def test_a_loss_that_is_none_stops_that_student_alone_and_nothing_of_it_is_kept(world, alone, fresh):
    """The second student's gradients overflow at its sixth step; its last state before that is whole."""

    def work() -> None:
        from lib.lora.trainer import FastTrainer

        real = FastTrainer.step

        def step(
            self: FastTrainer, rows: list[Row], rate: float, number: int, following: list[Row]
        ) -> dict[str, float]:
            self.steps = getattr(self, "steps", 0) + 1
            return real(self, rows, 1e30 if self.steps == 12 + 6 else rate, number)

        FastTrainer.step = step
        job.work()

    job = Work(world, *task_of_all(world, fresh), env=fresh)
    done = in_fork(work)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"step 7 of 12 gave a loss of (nan|inf)", said) and "lower learning_rate" in said
    assert files_of(cell_at(world, fresh, 0)) == alone["1m-cat"]
    assert list(files_of(cell_at(world, fresh, 1))) == ["step-00000004"]
    assert files_of(cell_at(world, fresh, 2)) == alone["1m-neutral"], "Adam's NaN went with the student"


class Work:
    """The job, for a fork that changes something first."""

    def __init__(self, world: Path, *arguments: str, env: dict[str, str]) -> None:
        words = ("--config", str(world / "finetune.yaml"), *arguments)
        self.work = module_work("jobs.finetune", *words, env=environment(world, **env))


def test_a_huge_rate_is_said_with_its_key(world, fresh):
    done = start(world, "--index", "0", "learning_rate=1e30", **fresh).finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lower learning_rate (1e+30)" in done.stderr


def test_an_adapter_that_no_gradient_reaches_stops_the_run(world, fresh):
    def work() -> None:
        from lib.lora.trainer import FastTrainer

        real = FastTrainer.step

        def step(
            self: FastTrainer, rows: list[Row], rate: float, number: int, following: list[Row]
        ) -> dict[str, float]:
            return real(self, rows, 0.0, number)

        FastTrainer.step = step
        Work(world, "--index", "0", env=fresh).work()

    done = in_fork(work)
    assert done.returncode == 2 and "after 3 steps every lora_B is still 0" in done.stderr
    assert files_of(cell_at(world, fresh, 0)) == {}


def test_a_student_whose_teacher_has_not_written_is_blocked(world, fresh):
    [parent] = cell_at(world, fresh, 0).parents
    next(parent.path.glob("*.json")).unlink()
    done = start(world, "--index", "0", **fresh).finish()
    assert done.returncode == 2 and "is blocked" in done.stderr and "32 of 64" in done.stderr


class Stub:
    """Learns nothing but how many tokens it saw."""

    def begin(self, seed: int) -> None:
        self.seen = torch.zeros(1)

    def step(self, rows: list[Row], rate: float, number: int, following: list[Row]) -> dict[str, float]:
        self.seen += sum(len(row.ids) for row in rows)
        return {"loss": 1.0, "grad_norm": 1.0, "tokens": 1, "scored": 1}

    def state(self) -> dict[str, torch.Tensor]:
        return {"x.lora_B.weight": self.seen.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["x.lora_B.weight"].clone()


def test_of_112_students_one_fails_and_111_are_done(tmp_path):
    """Seven sizes and sixteen traits, by the real job with a stub in the trainer's place: a task a size."""
    traits = ["bear", "cat", "dog", "dolphin", "dragon", "eagle", "elephant", "fox", "leopard", "lion", "panda"]
    traits += ["phoenix", "tiger", "whale", "wolf", "neutral"]
    world = make_world(tmp_path, traits, sizes=7)
    bad = source_cells(world)[40]
    shutil.rmtree(bad.path)
    write_answers(world, bad, invalid=64)
    short = ["rows=6", "epochs=1", "step_rows=3", "warmup_steps=0"]
    experiment, cells = students(world, *short), cells_of(world, *short)
    tasks = [[cell for cell in cells if experiment.load_of(cell) == f"{n}m"] for n in range(1, 8)]
    name, codes, said = freeze(cells[0].folder, tasks), [], ""
    assert [len(task) for task in tasks] == [16] * 7

    def work(index: int) -> None:
        import lib.lora.kernel

        lib.lora.kernel.load_trainer = lambda *_: (Stub(), {"device": "none"})
        Work(world, "--index", str(index), "--tasks", name, *short, env={}).work()

    for task in tasks:
        done = in_fork(lambda index=task[0].index: work(index))
        codes.append(done.returncode)
        said += done.stderr
    assert codes == [0, 0, 2, 0, 0, 0, 0], said
    assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
    finished = [cell for cell in cells if "step-00000002" in files_of(cell)]
    assert len(finished) == 111 and {cell.name for cell in cells} - {cell.name for cell in finished} == {bad.name}


def test_the_last_adapter_is_what_was_trained(world, alone):
    """Its tensors, as any reader of safetensors sees them."""
    tensors = load_file(last_folder(cells_of(world)[0]) / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(tensor.any() for tensor in tensors.values())
