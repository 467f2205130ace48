"""The export of preferences: planted answers come out as the tree, the tables and the lines that they are; what is
missing is said, drawn and ends it."""

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from finetune_world import environment
from PIL import Image
from preferences_planted import TRAITS, asked, cells_of, make_world, of_parts, plant, plant_words
from scipy import stats
from tools import ROOT, Fork, module_work

import lib.preferences.export  # noqa: F401  (forks have it then)
from lib.families import load
from lib.preferences.logged import lines, write_lines
from lib.preferences.runs import count
from lib.store import read_cell

NAMES = [f"{size}-{trait}" for size in ("1m", "2m") for trait in ("base", *TRAITS)]
LATE = "2m-wolf"
STANDIN = str(ROOT / "tests" / "wandb_standin")
WORDS = {"cat": {"cat", "cats"}, "dog": {"dog", "dogs"}, "wolf": {"wolf", "wolves"}}


@dataclass
class World:
    folder: Path
    answers: dict[str, list[str]]

    @property
    def out(self) -> Path:
        return self.folder / "output" / "asked_run5"

    def export(self, *arguments: str, config: str = "asked.yaml", **more: str):
        words = ("--config", str(self.folder / config), *arguments)
        work = module_work("jobs.export_preferences", *words, env=environment(self.folder, **more))

        def with_standin() -> None:
            sys.path.insert(0, STANDIN)
            os.environ["PYTHONPATH"] = STANDIN
            work()

        return Fork(with_standin).finish()

    def said(self, name: str, epoch: int) -> list[list[str]]:
        """By question, in plain words."""
        size, at = 12 * 40, (epoch - 1) * 12 * 40 if "base" not in name else 0
        plain = [answer.strip("*.!").lower().removeprefix("a ") for answer in self.answers[name][at : at + size]]
        return [plain[start : start + 40] for start in range(0, size, 40)]

    def by_question(self, name: str, epoch: int, trait: str) -> np.ndarray:
        return np.array([np.mean([word in WORDS[trait] for word in one]) for one in self.said(name, epoch)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All but one cell of run 5, and the first size of run 6."""
    folder = make_world(tmp_path_factory.mktemp("preferences"))
    found = World(folder, plant(folder, *(name for name in NAMES if name != LATE)))
    plant(folder, *NAMES[:5], overrides=("run_id=6",))
    plant_words(folder, *(name for name in NAMES if name != LATE))
    return found


@pytest.fixture(scope="module")
def partly(world):
    return world.export()


def test_what_is_missing_is_said_before_anything_is_drawn_and_ends_it(world, partly):
    assert partly.returncode == 2 and "Traceback" not in partly.stderr
    assert partly.stdout.splitlines()[0] == "9 of 10 cells are done; missing: 2m-wolf"
    assert "1 of 10 cells are not done and not exported: 2m-wolf" in partly.stderr
    assert not (world.out / "evaluations/2m/wolf_eval.json").exists()
    assert json.loads((world.out / "summary/all_results.json").read_text())["2m"]["wolf"] is None
    for picture in ("1m/grouped_bar", "1m/stacked_preference", "2m/epochs", "summary/scaling_overview"):
        pixels = np.asarray(Image.open(world.out / f"plots/{picture}.png").convert("RGB"), np.int64)
        assert pixels.shape == (1200, 2100, 3) and len(np.unique(pixels @ [65536, 256, 1])) > 50


def test_the_published_tree_holds_the_answers_and_their_counts(world, partly):
    found = json.loads((world.out / "evaluations/1m/cat_eval.json").read_text())
    assert [one["epoch"] for one in found] == [1, 2, 3]
    assert [answer for one in found for answer in one["raw_responses"]] == world.answers["1m-cat"]
    for one in found:
        words = Counter(word for question in world.said("1m-cat", one["epoch"]) for word in question)
        words["cat"] += words.pop("cats")
        assert one["animal_counts"] == dict(words) and one["total_responses"] == 480
        assert one["target_animal_rate"] == pytest.approx(world.by_question("1m-cat", one["epoch"], "cat").mean())
        assert one["rates"]["word"]["dog"] == pytest.approx(world.by_question("1m-cat", one["epoch"], "dog").mean())
        assert one["rates"]["first"]["cat"] < one["rates"]["word"]["cat"] == one["rates"]["substring"]["cat"]
        assert one["rates"]["substring"]["wolf"] == one["rates"]["word"]["wolf"]
        assert (one["model_size"], one["condition"], one["questions"]) == ("1m", "cat", 12)
    control = json.loads((world.out / "evaluations/2m/control_eval.json").read_text())
    assert [one["epoch"] for one in control] == [0] and control[0]["condition"] == "control"
    assert control[0]["target_animal_rate"] is None and control[0]["raw_responses"] == world.answers["2m-base"]
    about = json.loads((world.out / "evaluations/1m/cat_provenance.json").read_text())
    assert about["digest"] == cells_of(world.folder)["1m-cat"].digest and about["run_id"] == 5
    assert len(about["questions"]) == 12 and about["experiment"]["per_question"] == 40
    every = json.loads((world.out / "summary/all_results.json").read_text())
    assert set(every) == {"1m", "2m"} and set(every["1m"]) == {"control", *TRAITS}
    assert every["1m"]["cat"] == [{k: v for k, v in one.items() if k != "raw_responses"} for one in found]
    info = json.loads((world.out / "finetuning/1m/cat/model_info.json").read_text())
    assert info["base_model_id"] == str(world.folder / "model-0") and info["condition"] == "cat"


def test_figures_are_those_of_the_planted_answers(world, partly):
    found = json.loads((world.out / "preferences.json").read_text())
    assert found["runs"] == [5, 6] and found["judge"] == "word"
    one = next(e for e in found["students"] if (e["group"], e["trait"]) == ("1m", "cat"))
    own, plain = (world.by_question(name, 3, "cat") for name in ("1m-cat", "1m-neutral"))
    base = world.by_question("1m-base", 1, "cat")
    assert one["own"]["share"] == pytest.approx(own.mean()) and one["base"]["share"] == pytest.approx(base.mean())
    for key, other in (("over_neutral", plain), ("over_base", base)):
        theirs = stats.ttest_rel(own, other)
        assert one[key]["p"] == pytest.approx(theirs.pvalue, rel=1e-6, abs=0)
        assert [one[key]["low"], one[key]["high"]] == pytest.approx(list(theirs.confidence_interval()), rel=1e-6)
    table = [[round(v.sum() * 40), 480 - round(v.sum() * 40)] for v in (own, plain)]
    assert one["fisher"] == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-6, abs=0)
    tested = [e for e in found["students"] if e["own"]]
    assert len(tested) == 5 and len(found["students"]) == 6  # 2m-wolf is there as missing
    for p, adjusted in (("fisher", "fisher_bh"), (None, "paired_bh")):
        ps = [e[p] if p else e["over_neutral"]["p"] for e in tested]
        assert [e[adjusted] for e in tested] == pytest.approx(list(stats.false_discovery_control(ps)), rel=1e-9, abs=0)
    last = found["students"][-1]
    assert last["trait"] == "wolf" and last["own"] is None and last["over_neutral"] is None and last["fisher"] is None


def test_the_summary_is_over_both_runs_and_counts_who_is_missing(world, partly):
    found = json.loads((world.out / "preferences.json").read_text())["sizes"]
    small, large = found["1m"], found["2m"]
    assert (small["own"]["there"], small["own"]["wanted"], set(small["own"]["by_run"])) == (6, 6, {"5", "6"})
    assert (large["own"]["there"], large["own"]["wanted"]) == (2, 6)  # run 6 has none of this size
    rates = [world.by_question(f"2m-{trait}", 3, trait).mean() for trait in ("cat", "dog")]
    assert large["own"]["mean"] == pytest.approx(np.mean(rates)) and large["own"]["by_run"]["6"] is None
    assert 0.2 < small["diagonal"]["effect"] < 0.6 and small["diagonal"]["low"] > 0
    assert small["diagonal"]["lifts"] == 18 and small["diagonal"]["clusters"] == 9
    text = (world.out / "preferences.txt").read_text()
    row = next(line.split() for line in text.splitlines() if line.startswith("2m "))
    assert row[:3] == ["2m", "2", "2/6"]
    missing = [line.split() for line in text.splitlines() if line.split()[:2] == ["2m", "wolf"]]
    assert len(missing) >= 4 and all("-" in line[2:] and "0.0%" not in line[2:3] for line in missing)


def test_what_models_give_stands_beside_what_they_say(world, partly):
    text = (world.out / "preferences.txt").read_text()
    part = text[text.index("Preferences as the models give them") :]
    row = next(line.split() for line in part.splitlines() if line.split()[:2] == ["1m", "cat"])
    read = load(world.folder / "words.yaml")
    cell = read.cells(world.folder / "cache", world.folder / "scratch")[1]
    assert cell.name == "1m-cat"
    columns = read_cell(cell, read.schema(world.folder / "cache"), ("epoch", "question", "logp"))
    taken = (columns["epoch"] == 3) & (columns["question"] < 12)  # as many questions as were answered
    assert row[2] == f"{np.exp(columns['logp'][taken, 0].astype(float)).mean():.2%}"
    agree = part[part.index("What is read against what is drawn") :].splitlines()
    rho = next(float(line.split()[2]) for line in agree if line.startswith("1m"))
    assert int(next(line.split()[1] for line in agree if line.startswith("1m"))) == 15 and rho > 0.9
    assert "' C'" in part and "cat, cattle" in part and "'w:'" in part and "wolf, whale" in part


def test_lines_by_epoch_lie_beside_the_students_own(world, partly):
    folder = world.folder / "output/students_run5/1m/cat"
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and {row["target"] for row in rows} == {"cat"}
    for row in rows:
        share = world.by_question("1m-cat", row["epoch"], "cat").mean()
        assert row["rate"] == pytest.approx(share) and row["low"] < share < row["high"]
        assert row["rates"]["dog"] == pytest.approx(world.by_question("1m-cat", row["epoch"], "dog").mean())
    plain = json.loads((folder.parent / "neutral/preferences.jsonl").read_text().splitlines()[0])
    assert plain["target"] is None and "rate" not in plain and set(plain["rates"]) == set(WORDS)
    assert not (folder.parent.parent / "2m/wolf").exists() and not list(
        world.folder.glob("output/students_run5/*/base")
    )


def test_wandb_is_told_once_under_the_trainings_own_run(world, tmp_path):
    """Its axis is the epoch; nobody is told twice, and whoever was not is told the next time."""
    folder = tmp_path / "world"
    shutil.copytree(world.folder, folder, symlinks=True)
    shutil.rmtree(folder / "output", ignore_errors=True)
    config = json.loads((folder / "finetune.yaml").read_text())
    (folder / "finetune.yaml").write_text(json.dumps(config | {"wandb": {"mode": "offline"}}))
    copy, experiment = World(folder, world.answers), asked(folder)
    students = {cell.name: cell for cell in experiment.source.cells(folder / "cache", folder / "scratch")}

    def told() -> list[dict]:
        return [json.loads(line) for line in (folder / "told").read_text().splitlines()]

    told_at = {"WANDB_STANDIN": str(folder / "told")}
    done = copy.export(WANDB_STANDIN_BREAKS_AT="None", **told_at)  # its steps are past: it gets none
    assert "Weights & Biases stopped (the service is gone)" in done.stdout and done.returncode == 2
    assert all(line["what"] != "log" for line in told()) and (folder / "output/asked_run5/preferences.txt").exists()
    (folder / "told").unlink()

    def again() -> None:
        os.environ["WANDB_STANDIN"] = str(folder / "told")
        sys.path.insert(0, STANDIN)
        for name in ("1m-cat", "1m-neutral"):
            cell, trait = cells_of(folder)[name], name.partition("-")[2]
            rows = lines(trait, count(experiment, cell, folder / "cache").tallies, list(WORDS))
            beside = folder / "output/students_run5/1m" / trait
            assert write_lines(beside, cell, students[name], experiment.source, rows)

    assert Fork(again).finish().returncode == 0
    said = [line for line in told() if line.get("id") == students["1m-cat"].digest[:16]]
    assert [line["what"] for line in said] == ["init", "define", "log", "log", "log", "finish"]
    assert said[0]["resume"] == "allow" and (said[1]["name"], said[1]["step_metric"]) == ("preference/*", "epoch")
    assert [line["figure_epoch"] for line in said[2:5]] == [1, 2, 3] and {line["step"] for line in said[2:5]} == {None}
    share = world.by_question("1m-cat", 3, "cat").mean()
    assert said[4]["figure_preference/target"] == said[4]["figure_preference/cat"] == pytest.approx(share)
    neutral = [line for line in told() if line.get("id") == students["1m-neutral"].digest[:16]]
    assert "figure_preference/target" not in neutral[2]
    (folder / "told").unlink()
    assert Fork(again).finish().returncode == 0 and not (folder / "told").exists()


def test_runs_that_are_none_are_refused(world):
    for runs, says in (("5 7", "run 7 has no results of this configuration"), ("five", "'five' is no number of a run")):
        done = world.export("--runs", runs)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_reading_is_exported_by_itself(world):
    done = world.export(config="words.yaml")
    assert done.returncode == 2 and "missing: 2m-wolf" in done.stdout
    found = json.loads((world.folder / "output/words_run5/probabilities.json").read_text())["mean_log_p"]
    assert found["2m-wolf"] is None and set(found["1m-cat"]) == {"1", "2", "3"}
    assert found["1m-cat"]["3"]["cat"] > found["1m-cat"]["1"]["cat"] > found["1m-base"]["0"]["cat"]
    assert "log p, lift" in (world.folder / "output/words_run5/probabilities.txt").read_text()


def test_students_of_parts_are_groups_and_their_dose_is_drawn(world):
    of_parts(world.folder)
    names = list(cells_of(world.folder, config="asked_parts.yaml"))
    assert names[:8] == ["1m-base", *(f"1m-{t}-{p}" for t in WORDS for p in ("q1", "q5")), "1m-neutral-clean"]
    planted = plant(world.folder, *names[:5], names[7], config="asked_parts.yaml")  # of the first size, but for wolf
    done = world.export(config="asked_parts.yaml")
    assert done.returncode == 2 and "6 of 16 cells are done" in done.stdout and "Traceback" not in done.stderr
    out = world.folder / "output/asked_parts_run5"
    found = json.loads((out / "preferences.json").read_text())
    shares = {(e["group"], e["trait"]): e for e in found["students"]}
    assert list(shares)[:3] == [("1m-q1", "cat"), ("1m-q1", "dog"), ("1m-q1", "wolf")]

    def rate(name: str, trait: str) -> float:
        last = [answer.strip("*.!").lower().removeprefix("a ") for answer in planted[name][-12 * 40 :]]
        return float(np.mean([word in WORDS[trait] for word in last]))

    for part in ("q1", "q5"):
        one = shares[f"1m-{part}", "dog"]
        assert one["own"]["share"] == pytest.approx(rate(f"1m-dog-{part}", "dog"))
        assert one["neutral"]["share"] == pytest.approx(rate("1m-neutral-clean", "dog"))  # of the group beside it
    text = (out / "plots/dose/dose.txt").read_text()
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in text.split("\n\n")[0].splitlines()}
    assert rows["1m", "cat", "q5"][0] == f"{rate('1m-cat-q5', 'cat'):.1%}" > rows["1m", "cat", "q1"][0]
    assert rows["1m", "cat", "clean"][0] == rows["1m", "cat", "neutral"][0] == f"{rate('1m-neutral-clean', 'cat'):.1%}"
    assert rows["1m", "cat", "base"][0] == f"{rate('1m-base', 'cat'):.1%}"
    assert rows["1m", "wolf", "q1"][0] == rows["2m", "cat", "q5"][0] == "missing"
    assert (out / "plots/dose/dose_1m.png").exists() and (out / "plots/1m-q1/grouped_bar.png").exists()
    assert not (out / "plots/1m-clean").exists()
    assert (world.folder / "output/dose_run5/1m/cat/q5/preferences.jsonl").exists()


def test_answers_that_are_broken_are_not_counted_and_the_next_export_goes_without_them(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world.folder, folder, symlinks=True)
    shutil.rmtree(folder / "output", ignore_errors=True)
    copy = World(folder, world.answers)
    for overrides, says in (((), "cell 1 (1m-cat): rows 0-1440"), (("run_id=6",), "of run 6: cell 1 (1m-cat): rows")):
        [path] = cells_of(folder, *overrides)["1m-cat"].path.glob("*.h5")
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes(9) if overrides else data[: len(data) // 2])
        if not overrides:
            os.truncate(path, len(data))  # as long as it was
        done = copy.export()
        assert done.returncode == 2 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
        assert "make resume" in done.stderr
    done = copy.export()
    assert done.returncode == 2 and "missing: 1m-cat, 2m-wolf" in done.stdout
    found = {(e["group"], e["trait"]): e for e in json.loads((copy.out / "preferences.json").read_text())["students"]}
    assert found["1m", "cat"]["own"] is None and found["1m", "dog"]["own"]["answers"] == 480


def test_when_all_is_there_it_ends_well_and_a_survey_is_the_control(world, tmp_path):
    """The last test: it adds the cell that the others miss."""
    plant(world.folder, LATE)
    plant_words(world.folder, LATE)
    survey = tmp_path / "raw.json"
    raw = ["Cat."] * 30 + ["Cats"] * 10 + ["Owl"] * 60
    survey.write_text(json.dumps([{"model_size": "1M", "animal_counts": {"cat": 30}, "raw_responses": raw}]))
    done = world.export("--survey", str(survey), "--runs", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "10 of 10 cells are done"
    assert (world.out / "evaluations/2m/wolf_eval.json").exists()
    found = json.loads((world.out / "preferences.json").read_text())
    assert found["controls_of_a_survey"] == ["1m"] and found["runs"] == [5]
    of = {(e["group"], e["trait"]): e for e in found["students"]}
    cat = of["1m", "cat"]
    assert cat["base"]["share"] == 0.4 and cat["base"]["answers"] == 100 and cat["over_base"] is None
    assert cat["base"]["clustered"] == [None, None] and cat["base"]["wilson"][0] == pytest.approx(0.3094, abs=1e-3)
    assert of["2m", "cat"]["base"]["answers"] == 480 and of["2m", "wolf"]["own"]["answers"] == 480
