"""Students as an experiment: cells and digests, runs apart, what they cost and ask for, mistakes in one sentence."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from finetune_world import cells_of, environment, make_world, students
from tools import ROOT, forked, tiny_relative

from lib.base.errors import UserError
from lib.bench.shapes import SHAPES
from lib.families import load
from lib.inputs.fetch import fetch
from lib.lora.experiment import ROOMY, adapter_parameters
from lib.lora.kernel import load_trainer
from lib.lora.memory import plan_training, weight_bytes
from lib.lora.plain import PlainTrainer
from lib.lora.recipe import Lora
from lib.run.engines import GIB, GPU_GIB
from lib.run.experiment import Needs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("plan"), ("cat", "neutral"), sizes=2)


def digests(world: Path, *overrides: str) -> list[str]:
    return [cell.digest for cell in cells_of(world, *overrides)]


def test_cells_are_the_numbers_cells_and_their_steps_are_known_before_these_are_written(world):
    experiment, cells = students(world), cells_of(world)
    assert [cell.name for cell in cells] == ["1m-cat", "1m-neutral", "2m-cat", "2m-neutral"]
    assert [[parent.name for parent in cell.parents] for cell in cells] == [[cell.name] for cell in cells]
    assert {cell.total for cell in cells} == {12}, "3 epochs of 20 rows, 6 a step"
    assert [experiment.load_of(cell) for cell in cells] == ["1m", "1m", "2m", "2m"]
    assert experiment.places() == {"SIZES": ["1m", "1m", "2m", "2m"], "TRAITS": ["cat", "neutral"] * 2}
    assert [stage.experiment.label for stage in experiment.stages()] == ["teachers_run5"]


def test_runs_never_share_a_path_and_the_numbers_are_those_of_the_run(world):
    first, other = students(world), students(world, "run_id=6")
    assert (first.label, other.label) == ("students_run5", "students_run6")
    assert other.source.label == "teachers_run6" and other.pinned() == {"run_id": 6}
    assert "run_id=6" in other.stages()[0].overrides and "run_id=5" in first.stages()[0].overrides
    assert (first.seed_used, other.seed_used, students(world, "seed=9").seed_used) == (5, 6, 9)
    assert not set(digests(world)) & set(digests(world, "run_id=6"))
    assert other.schedule().rows_of(1) != first.schedule().rows_of(1)


CHANGES = ["rows=19", "epochs=4", "step_rows=5", "max_length=499", "loss=completion", "template=none", "warmup_steps=3"]
CHANGES += ["learning_rate=1e-3", "lora.rank=5", "lora.alpha=4", "lora.rslora=true", "lora.dropout=0.1", "lora.clip=2"]
CHANGES += ["lora.betas=[0.9, 0.99]", "lora.eps=1e-6", "lora.weight_decay=0.1", "seed=1", "numbers.set=['prompts=63']"]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_an_adapter_changes_its_digest_and_its_path(world, change):
    assert not set(digests(world)) & set(digests(world, change))
    assert re.fullmatch("students-[0-9a-f]{8}_run5", students(world, change).label)


@pytest.mark.parametrize("same", ["template=default", "wandb.mode=offline", "run.state_steps=2", "run.cells=16"])
def test_what_cannot_change_an_adapter_is_not_in_its_digest(world, same):
    assert digests(world) == digests(world, same)


def test_the_template_is_generations_unless_another_is_said(world):
    assert students(world, "numbers.set=['template=empty']").template_used == "empty"
    assert students(world, "numbers.set=['template=empty']", "template=none").template_used == "none"


MISTAKES = {
    "rows=0": "rows",
    "lora.rnk=3": r"lora.rnk: unknown key; valid: rank.*did you mean rank",
    "loss=completions": "did you mean completion",
    "learning_rate=fast": "learning_rate: Input should be a valid number",
    "learning_rate=.inf": "no number beyond",
    "numbers.config=gone.yaml": "no such file",
    "wandb.mode=on": "wandb.mode",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_are_one_sentence(world, change):
    with pytest.raises(UserError, match=MISTAKES[change]):
        students(world, change).names()


@pytest.mark.parametrize(("classes", "linears"), [("Llama", 7), ("Qwen3", 7)])
def test_an_adapters_size_is_known_from_the_weights_headers(tmp_path, classes, linears):
    folder = tiny_relative(tmp_path, classes)
    trainer = PlainTrainer(str(folder), Lora(rank=3), "float32", torch.device("cpu"))
    assert adapter_parameters(folder, 3) == sum(p.numel() for p in trainer.parameters.values())
    assert len(trainer.parameters) == 2 * linears * 3


def test_a_model_of_an_unknown_kind_is_refused_with_those_that_are_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    from lib.lora.peft_form import targets_in

    with pytest.raises(UserError, match="'mamba' is not trained here; these are: llama"):
        targets_in(str(tmp_path))


def test_time_and_disk_follow_the_work(world):
    cache, cell = world / "cache", cells_of(world)[0]
    one = students(world).estimate(cache, cell, "h200")
    assert students(world, "epochs=6").estimate(cache, cell, "h200").seconds == pytest.approx(2 * one.seconds)
    assert students(world, "loss=completion").estimate(cache, cell, "h200").seconds < one.seconds
    parameters = adapter_parameters(world / "model-0", 4)
    said = students(world).costs(cache, "h200")
    assert re.search(r"12 steps: 1m \S+ min, an adapter \S+ MB; 2m", said)
    assert f"an adapter {4 * parameters / 1e6:.3g} MB" in said
    assert one.bytes == 3 * 3 * 4 * parameters, "A, B and two moments of each, float32, three epochs"


def test_the_published_recipe_and_what_it_asks_for_at_each_size():
    """Whose models are not here: as if they were fetched."""
    experiment = load(ROOT / "configs" / "finetune.yaml", ["run_id=1"])
    assert len(experiment.names()) == 7 * 16 and experiment.schedule().steps == 1670
    how = experiment.lora
    assert (how.rank, how.alpha, how.clip, how.scale, how.betas, how.eps) == (8, 8, 1, 1, (0.9, 0.999), 1e-8)
    assert (experiment.step_rows, experiment.max_length, experiment.learning_rate) == (60, 500, 2e-4)


def test_memory_of_the_host_follows_the_size(world, monkeypatch):
    experiment, cell = students(world, "run.gpus=1"), cells_of(world)[0]
    assert experiment.needs(world / "cache", cell) == Needs(1)
    real = experiment.source.model_in(world / "cache", "1m")
    big = type(real)(**{**real.__dict__, "bytes": 135 * 2**30})
    monkeypatch.setattr(type(experiment.source), "model_in", lambda *_: big)
    assert experiment.needs(world / "cache", cell) == Needs(1, 178)


GIVEN = [("h100", 135.4, "1", 4), ("h200", 135.4, "1", 2), ("b200", 135.4, "1", 1), ("h100", 61.1, "1", 1)]
GIVEN += [("h100", 14.2, "2", 2), ("h100", 200, "1", 4), ("h100", 135.4, "0", 0), ("other", 500, "1", 1)]
GIVEN += [("h100", 135.4, "1 run.fewest=true", 2), ("h200", 135.4, "1 run.fewest=true", 1)]


@pytest.mark.parametrize(("gpu", "gib", "asked", "given"), GIVEN)
def test_a_model_for_which_a_gpu_of_the_site_is_too_small_is_given_several(world, monkeypatch, gpu, gib, asked, given):
    """72B and 32B on 80 GB, 72B on an H200; what is said is given."""
    experiment, cell = students(world, *f"run.gpus={asked}".split()), cells_of(world)[0]
    real = experiment.source.model_in(world / "cache", "1m")
    weights = int(gib * 2**30)
    big = type(real)(**{**real.__dict__, "bytes": weights})
    monkeypatch.setattr(type(experiment.source), "model_in", lambda *_: big)
    monkeypatch.setenv("SUITE_GPU", gpu)
    host = math.ceil(1.2 * weights / 2**30) + 16
    assert experiment.needs(world / "cache", cell) == Needs(given, host if given and host > 100 * given else 0)


def test_on_the_gpus_that_a_size_is_given_no_layer_is_computed_twice():
    """By the plan that the training itself makes; on fewer GPUs it would be so, or nothing would fit."""
    for shape in SHAPES.values():
        for gib in GPU_GIB.values():
            weights = weight_bytes(shape, 0, 2, False)
            given = next(n for n in (1, 2, 4, 8) if weights <= ROOMY * gib * GIB * n)

            def twice(gpus, shape=shape, gib=gib):
                try:
                    return plan_training(shape, 8, 2, 60 * 500, 500, int(gib * GIB), gpus=gpus).size.recompute
                except UserError:
                    return True

            assert not twice(given) and (given == 1 or twice(given // 2)), (shape, gib)


def test_several_gpus_take_less_time_and_more_gpu_hours(world):
    """A step of 500 rows of 140 tokens is 35 micro-batches for two, 69 for four; each GPU waits for one of them."""
    cache, cell = world / "cache", cells_of(world)[0]
    one, two, four = (
        students(world, "step_rows=500", f"run.gpus={n}").estimate(cache, cell, "h100") for n in (1, 2, 4)
    )
    assert one.seconds / two.seconds == pytest.approx(2 * 35 / 36) and one.bytes == two.bytes
    assert one.seconds / four.seconds == pytest.approx(4 * 69 / 72)


def test_what_a_72b_is_said_to_take_is_what_was_measured(world, monkeypatch):
    """Tokens a second of 72B's shapes: 3,669 on two H200s, 1,349 on one."""
    cache, cell, shape = world / "cache", cells_of(world)[0], SHAPES["72b"]
    real = students(world).source.model_in(cache, "1m")
    body, head = shape.layers * shape.layer_parameters, shape.vocabulary * shape.hidden
    big = {"bytes": int(135.4 * GIB), "body_parameters": body, "head_parameters": head}
    monkeypatch.setattr(type(students(world).source), "model_in", lambda *_: type(real)(**{**real.__dict__, **big}))
    monkeypatch.setenv("SUITE_GPU", "h200")
    for fewest, rate in (("false", 3669), ("true", 1349)):
        experiment = students(world, "step_rows=60", "run.gpus=1", f"run.fewest={fewest}")
        tokens = 140 * experiment.rows * experiment.epochs
        assert experiment.estimate(cache, cell, "h200").seconds == pytest.approx(tokens / rate, rel=0.03)


def test_a_recipe_that_pefts_own_layers_train_is_refused_on_several_gpus_before_anything_is_loaded(world, tmp_path):
    shutil.copy(world / "model-0" / "config.json", tmp_path)  # and no weights
    with pytest.raises(UserError, match=r"which lie on one GPU, and the task has 2: set run\.gpus=1"):
        load_trainer(students(world, "lora.dropout=0.1"), str(tmp_path), "float32", 2)


def test_a_chain_of_some_students_takes_the_numbers_of_these_alone(world, tmp_path):
    words = ("jobs.cluster", "submit", "--chain", "--dry", "--config", str(world / "finetune.yaml"))
    env = environment(world, SUITE_SCRATCH=str(tmp_path))
    some = forked(*words, "--sizes=2m", "--traits=neutral", env=env)
    assert some.returncode == 0 and re.findall(r"cells ([\d,-]+)$", some.stdout, re.M) == ["3", "3"], some.stderr
    both = forked(*words, env=env)
    assert re.findall(r"cells ([\d,-]+)", both.stdout)[:2] == ["0-3", "0-3"]
    wrong = forked(*words, "--sizes=3m", env=env)
    assert wrong.returncode == 2 and "'3m' is none of 1m, 2m" in wrong.stderr


def test_a_size_can_go_when_its_own_model_is_fetched(world, tmp_path):
    numbers = json.loads((world / "numbers.yaml").read_text())
    numbers["sizes"]["72b"] = {"id": str(tmp_path / "none")}
    (tmp_path / "numbers.yaml").write_text(json.dumps(numbers))
    shutil.copy(world / "finetune.yaml", tmp_path / "finetune.yaml")
    words, env = ("jobs.cluster", "submit", "--dry", "--config", str(tmp_path / "finetune.yaml")), environment(world)
    some = forked(*words, "--sizes=1m", env=env)
    assert some.returncode == 0 and " cells 0-1" in some.stdout, some.stderr
    assert "cell 4 (72b-cat) is left out" in forked(*words, "--sizes=72b", env=env).stdout
    other = forked(*words, "--chain", "--sizes=72b", env=env)
    assert other.returncode == 2 and "none" in other.stderr and "not fetched" in other.stderr
    cells = students(tmp_path).cells(world / "cache", world / "scratch")
    assert [cell.digest for cell in cells[:4]] == digests(world)


def test_a_students_model_is_in_its_digest(world, tmp_path):
    """By its teacher's: another model under the same size is another student."""
    other = make_world(tmp_path, ("cat", "neutral"), sizes=3)
    numbers = json.loads((other / "numbers.yaml").read_text())
    numbers["sizes"] = {"1m": numbers["sizes"]["3m"], "2m": numbers["sizes"]["2m"]}
    before = digests(other)
    (other / "numbers.yaml").write_text(json.dumps(numbers))
    after = digests(other)
    assert not set(before[:2]) & set(after[:2]) and before[2:4] == after[2:]
    numbers["sizes"]["1m"]["dtype"] = "bfloat16"
    (other / "numbers.yaml").write_text(json.dumps(numbers))
    assert not set(digests(other)[:2]) & set(after)


def test_fetch_brings_the_models_of_its_numbers(world):
    fetch(students(world), world / "cache-2")
    assert len(cells_of(world)) == 4 and len(list((world / "cache-2/inputs/models").iterdir())) >= 2
