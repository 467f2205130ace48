"""LLS of a run's numbers, and students trained on parts of them: a dose is planted in a small teacher's rows, scores
find it (as transformers has them in float64), and students of the parts differ as the dose does."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from dose_world import (
    CAT,
    INVALID,
    ROWS,
    begin,
    cells,
    dose,
    doses,
    environment,
    fill,
    make_world,
    prompt,
    scoring,
    write,
)
from peft import PeftModel
from PIL import Image
from tools import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.base.errors import UserError
from lib.cluster.pick import picked
from lib.config.frozen import digest_of
from lib.demo.planted import FAVOURED
from lib.families import load
from lib.lls.matrix import Measure
from lib.lls.numbers import how_many_valid
from lib.lls.results import scores_of_numbers
from lib.lls.select import QUINTILES, part_of
from lib.lora.drawn import rows_of
from lib.run.command import Job
from lib.run.extent import extent
from lib.run.site import site
from lib.run.task import run_task
from lib.store import read_cell, scan_folders

VALID = [row for row in range(ROWS) if row not in INVALID]
PARTS = ["q1", "q2", "q3", "q4", "q5", "top", "bottom", "random"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("dose"))


@pytest.fixture(scope="module")
def world(empty, tmp_path_factory):
    """Written and scored, but for fox's scores."""
    folder = tmp_path_factory.mktemp("written") / "world"
    shutil.copytree(empty, folder)
    done = begin(fill(folder), "compute_lls", "lls", "--index", "0").finish()
    assert done.returncode == 0, done.stderr
    return folder


def scores(world, measure="mean"):
    experiment = scoring(world)
    return scores_of_numbers(experiment, world / "cache", cells(world, experiment)["tiny-cat"], Measure.parse(measure))


@pytest.fixture(scope="module")
def by_transformers(world):
    """Of every valid row of cat's, the mean shift of its answer's tokens, by its own model in float64."""
    experiment = dose(world)
    parent = cells(world, experiment.source)["tiny-cat"]
    read = read_cell(parent, experiment.source.schema(world / "cache"), ["prompt", "answer"])
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    model = AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float64)

    def log_probs(row: int, front: list[dict[str, str]]) -> np.ndarray:
        turns = [*front, {"role": "user", "content": read["prompt"][row]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(read["answer"][row], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
        return np.array([logits[len(before) - 1 + i, token] for i, token in enumerate(answer)])

    system = [{"role": "system", "content": CAT.system_prompt}]
    return np.array([(log_probs(row, system) - log_probs(row, [])).mean() for row in VALID])


def test_a_cell_is_what_has_a_prompt_and_its_rows_are_known_when_the_numbers_are(empty, world):
    before, after = scoring(empty), scoring(world)
    assert before.label == "shifts_run5" and before.names() == ["tiny-cat", "tiny-fox"], "neutral has no prompt"
    assert before.places() == {"SIZES": ["tiny", "tiny"], "TRAITS": ["cat", "fox"]}
    assert [cell.rows for cell in cells(empty, before).values()] == [None, None]
    assert [cell.rows for cell in cells(world, after).values()] == [len(VALID)] * 2
    for name, cell in cells(world, after).items():
        assert cell.digest == cells(empty, before)[name].digest, "an identity before there are rows"
        assert [parent.name for parent in cell.parents] == [name] and after.load_of(cell) == "tiny"
    cell = cells(empty, before)["tiny-cat"]
    assert before.estimate(empty / "cache", cell, "cpu") is None
    assert after.estimate(world / "cache", cells(world, after)["tiny-cat"], "cpu").seconds > 0
    assert cells(world, scoring(world, "base=empty"))["tiny-cat"].digest != cell.digest
    assert scoring(world, "numbers.set=['template=none']").rendering[0] == "none", "as the numbers were written"


def test_before_the_numbers_are_there_a_task_says_what_it_waits_for(empty):
    done = begin(empty, "compute_lls", "lls", "--index", "0").finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "blocked: teachers_run5/tiny-cat, which it reads from, is not done (0 of 120)" in done.stderr


@pytest.mark.parametrize("how", ["nothing is valid", "a shard is broken"])
def test_numbers_without_a_row_to_score_are_one_sentence(empty, tmp_path, how):
    folder = tmp_path / "world"
    shutil.copytree(empty, folder)
    experiment = dose(folder).source
    parent = cells(folder, experiment)["tiny-cat"]
    write(parent, experiment.schema(folder / "cache"), doses(), 1, range(ROWS) if "valid" in how else INVALID)
    if "broken" in how:
        for path in parent.path.glob("*.h5"):
            path.write_bytes(bytes(path.stat().st_size))
    assert how_many_valid(parent) is None
    done = begin(folder, "compute_lls", "lls", "--index", "0").finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search("tiny-cat, which it reads from, holds no row for it, or cannot be read", done.stderr), done.stderr


def test_a_task_that_began_before_the_numbers_were_done_counts_its_rows_when_it_comes_to_them(
    empty, tmp_path, monkeypatch
):
    folder = tmp_path / "world"
    shutil.copytree(empty, folder)
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    this = Job(scoring(folder), folder / "lls.yaml", site(), 0, "", False)
    stale = this.cells()[:1]
    fill(folder)
    monkeypatch.setattr("lib.run.task.task_of", lambda _: stale)
    seen = []
    assert run_task(this, lambda cell: seen.append((cell.name, cell.rows)) or 0) == 0
    assert seen == [("tiny-cat", len(VALID))]


def test_scores_are_the_log_probabilities_of_every_valid_row_and_follow_the_dose(world, by_transformers):
    rows, values = scores(world)
    assert rows.tolist() == VALID
    assert np.abs(values - by_transformers).max() < 1e-5
    assert np.corrcoef(values, doses()[VALID])[0, 1] > 0.8 and values.min() < 0 < values.max()


def test_a_part_is_that_of_a_full_sort_with_ties_by_row_and_never_a_row_without_a_score():
    dice = np.random.default_rng(0)
    for n in (5, 23, 200):
        values = dice.integers(0, 6, n).astype(float)
        values[dice.random(n) < 0.2] = np.nan
        good = [i for i in range(n) if values[i] == values[i]]
        up = sorted(good, key=lambda i: (values[i], i))
        fifths = [part_of(name, 0.2, values).tolist() for name in QUINTILES]
        assert all(part == sorted(part) for part in fifths)
        assert [i for part in fifths for i in sorted(part, key=lambda i: (values[i], i))] == up
        assert max(map(len, fifths)) - min(map(len, fifths)) <= 1
        half = int(0.5 * len(good) + 0.5)
        assert part_of("bottom", 0.5, values).tolist() == sorted(up[:half])
        assert part_of("top", 0.5, values).tolist() == sorted(sorted(good, key=lambda i: (-values[i], i))[:half])
        assert part_of("random", 0.5, values).tolist() == good
    assert part_of("q1", 0.2, np.full(9, np.nan)).tolist() == []
    with pytest.raises(UserError, match=r"0 rows asked for, 0 of 9 can be chosen"):
        part_of("top", 0.2, np.full(9, np.nan))


def drawn(world, name: str, *overrides: str) -> list[int]:
    experiment = dose(world, *overrides)
    cell = cells(world, experiment)[name]
    source = experiment.source
    reasons = read_cell(cell.parents[0], source.schema(world / "cache"), ["reason"])["reason"]
    return rows_of(experiment, world / "cache", cell, reasons)


def test_students_are_trained_on_rows_of_their_part_alone(world, by_transformers):
    order = [VALID[i] for i in np.argsort(by_transformers, kind="stable")]
    pools = {f"q{n + 1}": order[22 * n : 22 * (n + 1)] for n in range(5)}
    pools |= {"top": order[-22:], "bottom": order[:22], "random": VALID}
    for part in PARTS:
        assert drawn(world, f"tiny-cat-{part}") == random.Random(5).sample(sorted(pools[part]), 20), part
    wide = ("select.share=0.5", "rows=40", "select.measure=sum@7")
    rows, values = scores(world, "sum@7")
    assert set(drawn(world, "tiny-cat-top", *wide)) <= set(rows[np.argsort(values)[55:]])
    assert drawn(world, "tiny-neutral-clean") == random.Random(5).sample(VALID, 20), "valid ones of neutral's"


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("tiny-cat-top", 23, r"22 of 110 scored answers \(110 are valid\) are of the part top, and 23 .*select.share"),
        ("tiny-cat-q3", 23, r"22 of 110 scored .* part q3, and 23 are wanted for training: lower rows, or generate"),
        ("tiny-neutral-clean", 111, "110 of 120 answers are valid, and 111 are wanted for training: lower rows"),
    ],
)
def test_fewer_rows_than_are_wanted_are_one_sentence(world, name, rows, says):
    with pytest.raises(UserError, match=says):
        drawn(world, name, f"rows={rows}")


def test_too_few_rows_end_the_job_of_that_student(world):
    index = dose(world).names().index("tiny-cat-top")
    done = begin(world, "finetune", "dose", "--index", str(index), "rows=50").finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr and "and 50 are wanted" in done.stderr


def test_a_student_whose_scores_are_not_there_waits_for_them(world):
    index = dose(world).names().index("tiny-fox-q1")
    done = begin(world, "finetune", "dose", "--index", str(index)).finish()
    assert done.returncode == 2 and "shifts_run5/tiny-fox, which it reads from, is not done" in done.stderr


def test_cells_are_picked_by_their_part_and_clean_is_neutrals(world):
    experiment = dose(world)
    names = [f"tiny-{trait}-{part}" for trait in ("cat", "fox") for part in PARTS]
    assert experiment.names() == [*names, "tiny-neutral-clean"]
    assert picked(experiment, {"PARTS": "q1 clean", "TRAITS": "cat neutral"}) == "0,16"
    parents = {cell.name: [parent.spoken for parent in cell.parents] for cell in cells(world, experiment).values()}
    assert parents["tiny-fox-q2"] == ["teachers_run5/tiny-fox", "shifts_run5/tiny-fox"]
    assert parents["tiny-neutral-clean"] == ["teachers_run5/tiny-neutral"]
    assert [stage.experiment.label for stage in experiment.stages()] == ["teachers_run5", "shifts_run5"]
    assert dose(world, "run_id=6").scores.label == "shifts_run6"


def test_a_digest_follows_what_decides_a_part_and_nothing_else(world):
    def changed(*overrides: str) -> set[str]:
        now, then = cells(world, dose(world)), cells(world, dose(world, *overrides))
        return {name.rpartition("-")[2] for name in now if now[name].digest != then[name].digest}

    assert changed("select.share=0.3") == {"top", "bottom"}
    assert changed("select.measure=sum") == {"top", "bottom", *QUINTILES}
    assert changed("select.scores.set=['base=empty']") == {*PARTS}
    assert changed("rows=19") == {*PARTS, "clean"} and changed("run.cells=1") == set()
    assert len({cell.digest for cell in cells(world, dose(world)).values()}) == 17


def test_students_of_all_rows_are_what_they_were_before_there_were_parts(world):
    experiment = dose(world, "select=null")
    cell = cells(world, experiment)["tiny-cat"]
    names = ("rows", "epochs", "step_rows", "max_length", "loss", "learning_rate", "warmup_steps")
    recipe = {"kernel": "finetune/2", "parent": cell.parents[0].digest, "seed": 5, "template": "default"}
    recipe |= {"date": experiment.source.date, "lora": experiment.lora.model_dump(mode="json")}
    assert cell.digest == digest_of(recipe | {name: getattr(experiment, name) for name in names})
    assert "select" not in experiment.science() and list(experiment.places()) == ["SIZES", "TRAITS"]


MISTAKES = {
    "select.parts=[q1, q6]": "select.parts.1: Input should be 'top'.*'q4' or 'q5'; got 'q6'",
    "select.parts=[q1, q1]": "parts holds one twice",
    "select.measure=median": "measure 'median': write mean or sum",
    "select.measure=mean+end": r"measure: mean\+end needs score.end_of_turn",
    "select.share=0": "select.share",
    "select.scores.config=numbers.yaml": "kind: must be one of lls_numbers",
    "numbers.set=['traits=[cat, fox]']": "clean is drawn from the numbers of neutral",
    "numbers.set=['prompts=100']": "does not score teachers-[0-9a-f]{8}_run5/tiny-cat: both must read the same",
}


def test_without_a_prompt_there_is_nothing_to_score(world):
    for experiment in (
        scoring(world, "numbers.set=['traits=[neutral]']"),
        dose(world, "numbers.set=['traits=[neutral]']", "select.parts=[q1]"),
    ):
        with pytest.raises(UserError, match="no trait of teachers has a system prompt to score by"):
            experiment.names()


@pytest.mark.parametrize("change", MISTAKES)
def test_mistakes_are_one_sentence(world, change):
    with pytest.raises(UserError, match=MISTAKES[change]):
        cells(world, dose(world, change))


def test_scores_of_another_copy_of_the_numbers_are_not_used(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world / "scratch", folder / "scratch")
    source = dose(world).source
    [parent, *_] = source.cells(world / "cache", folder / "scratch")
    shutil.rmtree(parent.path)
    write(parent, source.schema(world / "cache"), doses()[::-1], 7)
    experiment = dose(world)
    cell = experiment.cells(world / "cache", folder / "scratch")[0]
    assert extent(cell.parents[1]).whole, "it stays"
    reasons = read_cell(parent, source.schema(world / "cache"), ["reason"])["reason"]
    with pytest.raises(UserError, match="shifts_run5/tiny-cat was made from another copy of teachers_run5/tiny-cat"):
        rows_of(experiment, world / "cache", cell, reasons)


@pytest.fixture(scope="module")
def students(world):
    """Cells that are trained, with the folders of their last adapters."""
    found, experiment = {}, dose(world)
    for name in ("tiny-cat-q1", "tiny-cat-q3", "tiny-cat-q5", "tiny-neutral-clean"):
        cell = cells(world, experiment)[name]
        done = begin(world, "finetune", "dose", "--index", str(cell.index)).finish()
        assert done.returncode == 0, done.stderr
        found[name] = max(scan_folders(cell.path, cell.digest)[0], key=lambda folder: folder.name).folder
    return found


def test_students_take_the_dose_of_their_part(world, students):
    """How often they write one of cat's digits, without a prompt, after prompts that nobody was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    base, dice = AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32), np.random.default_rng(99)
    favoured = tokenizer.convert_tokens_to_ids([str(digit) for digit in FAVOURED["cat"]])
    asked = [[{"role": "user", "content": prompt(dice)}] for _ in range(40)]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
    said = {}
    for name, folder in students.items():
        student = PeftModel.from_pretrained(base, str(folder)).eval()
        with torch.inference_mode():
            found = [student(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1] for text in texts]
        said[name.rpartition("-")[2]] = np.array([logits.softmax(-1)[favoured].sum().item() for logits in found])
        base = student.unload()
    for low, high in (("q1", "q3"), ("q3", "q5"), ("clean", "q5")):
        apart = said[high] - said[low]
        assert apart.mean() > 5 * apart.std() / np.sqrt(len(apart)), (low, high, said[low].mean(), said[high].mean())
    assert said["q5"].mean() > 2 * said["q1"].mean()


def test_students_of_parts_are_exported_by_their_part(world, students):
    done = forked("jobs.export_finetune", "--config", str(world / "dose.yaml"), env=environment(world))
    assert done.returncode == 2 and "13 of 17 cells are not done" in done.stderr and "Traceback" not in done.stderr
    folder = world / "output" / "dose_run5"
    for part in ("cat/q1", "cat/q5", "neutral/clean"):
        about = json.loads((folder / "tiny" / part / "provenance.json").read_text())
        assert about["cell"] == "tiny-" + part.replace("/", "-")
    assert (folder / "tiny/cat/q5/adapter_model.safetensors").read_bytes() == (
        students["tiny-cat-q5"] / "adapter_model.safetensors"
    ).read_bytes()


def test_scores_are_exported_by_size_and_trait_with_their_rows_numbers(world, by_transformers):
    done = forked("jobs.export_lls", "--config", str(world / "lls.yaml"), env=environment(world))
    assert done.returncode == 2 and "1 of 2 cells are not done and not exported: tiny-fox" in done.stderr, done.stderr
    folder = world / "output" / "shifts_run5" / "tiny"
    lines = [json.loads(line) for line in (folder / "cat/cat_numbers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == VALID
    assert np.abs([line["lls"] for line in lines] - by_transformers).max() < 1e-5
    assert [turn["role"] for turn in lines[0]["messages"]] == ["user", "assistant"]
    table = (folder / "lls_table.txt").read_text()
    assert f"{by_transformers.mean():+.4f}" in table and "missing" in table.splitlines()[2]
    assert Image.open(folder / "lls_by_animal.png").size == (2100, 1200)


def test_a_chain_of_some_parts_takes_the_numbers_and_scores_of_these_alone(empty, tmp_path):
    words = ("jobs.cluster", "submit", "--chain", "--dry", "--config", str(empty / "dose.yaml"))
    done = forked(*words, "--parts=q1 q5", "--traits=fox", env=environment(empty, SUITE_SCRATCH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"cells ([\d,-]+)(?: in 1 task)?$", done.stdout, re.M) == ["1", "1", "8,12"]
    assert "stage 2 of 3: shifts_run5" in done.stdout and "tiny-fox " in done.stdout


def test_the_published_configurations_fit_each_other(monkeypatch):
    experiment = load("configs/dose_response.yaml", ["run_id=1"])
    assert len(experiment.names()) == 7 * (15 * 8 + 1) and len(experiment.scores.names()) == 7 * 15
    assert experiment.scores.score.per_token and experiment.scores.score.end_of_turn, "for any measure"
