"""A run's page, and results that come from another machine."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from finetune_world import environment
from preferences_world import begin, finished, make_world
from tools import ROOT, forked

from lib.base.atomic import TEMPORARY
from lib.base.errors import UserError
from lib.cluster import grid
from lib.cluster.pipeline import requests_of, statuses
from lib.cluster.status import CellState, Status
from lib.families import load
from lib.run import extent
from lib.run.site import Site
from lib.store import read_cell


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that is done but for one student's answers."""
    folder = make_world(tmp_path_factory.mktemp("page"))
    for what, count in (("words", 3), ("asked", 2)):
        for index in range(count):
            finished(begin(folder, what, "--index", str(index)))
    pipeline = {"kind": "pipeline", "name": "whole", "run_id": 5, "wanted": [{"config": "asked.yaml"}]}
    (folder / "whole.yaml").write_text(json.dumps(pipeline))
    return folder


def run(world, module, *arguments, **more):
    return forked(module, "--config", str(world / "whole.yaml"), *arguments, env=environment(world, **more))


def test_the_page_says_how_far_it_is_what_came_out_what_it_cost_and_what_is_missing(world):
    done = run(world, "jobs.report")
    assert done.returncode == 2 and "1 of 10 cells are not done, and drawn as missing" in done.stderr, done.stderr
    folder = world / "output" / "whole_run5" / "report"
    page, text = (folder / "index.html").read_text(), (folder / "report.txt").read_text()
    for section in ("progress", "results", "cost", "failures"):
        assert f'id="{section}"' in page
    assert "9 of 10" in page and "GPU-hours" in page
    pictures = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(pictures) >= 4 and all((folder / name).is_file() for name in pictures)
    assert any("grouped_bar" in name for name in pictures) and any("scaling_overview" in name for name in pictures)
    row = next(line for line in text.splitlines() if line.startswith("1m") and "asked_run5" in line)
    assert row.split()[2:] == ["D", "D", "."]  # base, cat, neutral
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_lies_where_the_run_says_however_it_is_said_and_an_unreadable_log_is_said(world, tmp_path):
    (tmp_path / "log").mkdir()
    beat = {
        "cell": "1m-neutral",
        "digest": load(world / "asked.yaml").cells(world / "cache", world / "scratch")[2].digest,
    }
    beat |= {"state": "failed", "started": 1.0, "updated": 2.0, "error": "no", "log": str(tmp_path / "log")}
    path = world / "scratch" / "asked_run5" / "tasks" / "1m-neutral-9_9.r0.json"
    path.write_text(json.dumps(beat))
    done = run(world, "jobs.report", "run_id=5", SUITE_OUTPUT=str(tmp_path / "out"))
    path.unlink()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    page = (tmp_path / "out" / "whole_run5" / "report" / "index.html").read_text()
    assert f"{tmp_path / 'log'} cannot be read: is not a file" in page
    (tmp_path / "full").write_text("")
    done = run(world, "jobs.report", SUITE_OUTPUT=str(tmp_path / "full"))
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write ") and done.stderr.count("\n") == 1


def test_the_page_shows_no_picture_that_is_half_written_and_says_which_it_cannot_read(world):
    students, page = world / "output" / "students_run5", world / "output" / "whole_run5" / "report" / "index.html"
    students.mkdir(parents=True, exist_ok=True)
    left = page.with_name(f"{TEMPORARY}{signature_of_a_dead_process()}-index.html")
    left.parent.mkdir(parents=True, exist_ok=True)
    half = students / left.name.replace("index.html", "loss.png")
    left.touch(), half.touch()
    assert "1 of 10 cells are not done" in run(world, "jobs.report").stderr
    assert "loss.png" in page.read_text() and TEMPORARY not in page.read_text() and not left.exists()
    half.rename(students / "odd.png")
    (students / "odd.png").unlink(), (students / "odd.png").symlink_to("nowhere")
    done = run(world, "jobs.report")
    (students / "odd.png").unlink()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{students / 'odd.png'} cannot be read: No such file or directory; remove it" in done.stderr


def bring(world, far, here, *arguments, code=0):
    done = run(world, "jobs.bring", "--from", str(far), *arguments, SUITE_SCRATCH=str(here))
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_results_are_brought_with_every_byte_looked_at(world):
    far, here = world / "scratch", world / "here"
    damaged, gone = load(world / "words.yaml").cells(world / "cache", far)[1:]
    shard, lost = next(damaged.path.glob("*.h5")), next(gone.path.glob("*.h5"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    lost.rename(world / "lost.h5")  # its marker came first, say, by a copy that is under way
    said = bring(world, far, here, code=2)
    shard.write_bytes(whole)
    assert "words_run5: 1 brought, 0 here already, 0 not there" in said and "1m-cat: " in said
    assert "1m-neutral: " in said and f"{lost.name}: No such file" in said
    assert "2 cells are not whole" in said and "asked_run5: 2 brought, 0 here already, 1 not there" in said
    mine = load(world / "words.yaml").cells(world / "cache", here)
    assert list(mine[0].path.parent.iterdir()) == [mine[0].path]
    (world / "lost.h5").rename(lost)
    assert "words_run5: 2 brought, 1 here already" in bring(world, far, here)
    for name in ("words", "asked"):
        experiment = load(world / f"{name}.yaml")
        schema = experiment.schema(world / "cache")
        for a, b in zip(experiment.cells(world / "cache", far), experiment.cells(world / "cache", here), strict=True):
            if a.path.exists():
                one, other = (read_cell(cell, schema, schema) for cell in (a, b))
                assert all(list(map(str, one[key])) == list(map(str, other[key])) for key in schema)


def test_results_without_what_they_were_made_from_are_no_others_children(world, tmp_path):
    said = bring(world, world / "scratch", tmp_path, "--stages", "preference_logprobs preferences")
    assert "teachers_run5" not in said and "words_run5: 3 brought" in said
    words = ("status", "--config", str(world / "words.yaml"))
    done = forked("jobs.cluster", *words, env=environment(world, SUITE_SCRATCH=str(tmp_path)))
    assert "3 done" in done.stdout and "older" not in done.stdout, done.stdout + done.stderr
    env = environment(world, SUITE_SCRATCH=str(tmp_path))
    words = {"kind": "pipeline", "name": "some", "run_id": 5, "wanted": [{"config": "words.yaml"}]}
    (world / "some.yaml").write_text(json.dumps(words))
    some, whole = (
        forked("jobs.cluster", "status", "--config", str(world / f"{n}.yaml"), env=env) for n in ("some", "whole")
    )
    assert "4 of those that are not done are not needed" in some.stdout, some.stdout + some.stderr
    assert re.findall("next: make (\\S+)", some.stdout) == ["report"]
    assert "2 of those that are not done are not needed" in whole.stdout  # neutral's answers want its student
    assert re.findall("next: make (\\S+)", whole.stdout) == ["resume"]


def test_what_a_kill_left_of_an_import_goes_and_what_was_begun_here_is_said(world, tmp_path):
    cells = load(world / "words.yaml").cells(world / "cache", tmp_path)
    left = cells[0].path.parent / f"{TEMPORARY}{signature_of_a_dead_process()}-{cells[0].path.name}"
    left.mkdir(parents=True)
    shutil.copytree(load(world / "words.yaml").cells(world / "cache", world / "scratch")[1].path, cells[1].path)
    next(cells[1].path.glob("*.h5")).unlink()
    begun = sorted(cells[1].path.iterdir())
    said = bring(world, world / "scratch", tmp_path, "--stages", "preference_logprobs", code=2)
    assert "words_run5: 2 brought, 0 here already, 1 begun here and left as they are, 0 not there" in said
    assert "1 cells were begun here: end them with `make resume" in said and not left.exists()
    assert sorted(cells[1].path.iterdir()) == begun


def test_two_imports_at_once_bring_each_cell_once(world, tmp_path, monkeypatch):
    """The other one is quicker by the moment between a look and the rename."""
    theirs = load(world / "words.yaml").cells(world / "cache", world / "scratch")[0]
    cell = load(world / "words.yaml").cells(world / "cache", tmp_path)[0]
    sync = import_module("lib.subliminal.bring").sync_folder

    def other_first(folder):
        if not cell.path.exists():
            shutil.copytree(theirs.path, cell.path)
        sync(folder)

    monkeypatch.setattr("lib.subliminal.bring.sync_folder", other_first)
    said = bring(world, world / "scratch", tmp_path, "--stages", "preference_logprobs")
    assert "words_run5: 3 brought" in said and extent.extent(cell).whole
    assert not [path for path in cell.path.parent.iterdir() if path.name.startswith(".")]


def signature_of_a_dead_process():
    ended = subprocess.run(
        [sys.executable, "-c", "from lib.base.process import signature; print(signature())"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
    )
    return ended.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--from", ""), "from where? say FROM="),
        (("--from", "nowhere"), "FROM=nowhere is no folder"),
        (("--from", "{world}/cache", "--stages", "preference"), "STAGES: preference is none of numbers, finetune"),
        (("--from", "{world}/scratch"), "is this scratch itself"),
        (("--from", "{world}/scratch/words_run5"), "holds none of teachers_run5, students_run5"),
        (("--from", "{world}/here", "run_id=6"), "holds none of teachers_run6, "),
    ],
)
def test_what_cannot_be_brought_is_one_sentence(world, arguments, why):
    done = run(world, "jobs.bring", *(text.format(world=world) for text in arguments))
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


def test_another_runs_cells_are_told_apart(world, tmp_path):
    """Digests are in the paths: a run with other settings brings nothing."""
    shutil.copytree(world / "scratch", tmp_path / "far")
    for cells in (tmp_path / "far").glob("words_run5/cells"):
        for path in list(cells.iterdir()):
            path.rename(path.with_name(path.name[:-8] + "0" * 8))
    done = run(world, "jobs.bring", "--from", str(tmp_path / "far"), SUITE_SCRATCH=str(tmp_path / "near"))
    assert "words_run5: 0 brought, 0 here already, 3 not there, 3 of other settings or models" in done.stdout


def test_stages_come_once_after_what_they_read_from_and_of_one_run():
    wanted = ["preferences", "publish", "lls_numbers", "dose_response"]
    words = f"wanted=[{', '.join(f'{{config: {name}.yaml}}' for name in wanted)}]"
    pipeline = load(ROOT / "configs" / "subliminal.yaml", ["run_id=2", words])
    labels = [stage.experiment.label for stage in pipeline.stages()]
    assert labels == [
        *("numbers_run2", "finetune_run2", "preference_logprobs_run2", "preferences_run2"),
        *("publish_run2", "lls_numbers_run2", "dose_response_run2"),
    ]
    for stage in pipeline.stages():
        assert {"run_id=2"} == {word for word in stage.overrides if word.startswith("run_id")}
        assert all(
            one.experiment.label in labels[: labels.index(stage.experiment.label)] for one in stage.experiment.stages()
        )
    with pytest.raises(UserError, match="is a pipeline itself"):
        load(ROOT / "configs" / "subliminal.yaml", ["run_id=2", "wanted=[{config: subliminal.yaml}]"]).stages()


def test_a_size_that_is_not_fetched_keeps_no_other_from_being_shown(world, tmp_path):
    for path in world.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    numbers = json.loads((world / "numbers.yaml").read_text())
    sizes = numbers["sizes"] | {"9b": {"id": "nobody/nothing", "dtype": "float32"}}
    (tmp_path / "numbers.yaml").write_text(json.dumps(numbers | {"sizes": sizes}))
    words = ("status", "--config", str(tmp_path / "whole.yaml"))
    done = forked("jobs.cluster", *words, env=environment(world))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = {line[8:].split()[0]: line for line in done.stdout.splitlines() if line[8:].startswith("teachers_run5")}
    assert done.stdout.count("teachers_run5") == 2 and "9b" in lines["teachers_run5"]
    assert "1m: " in done.stdout and "9b: 0.00 GPU-hours left" in done.stdout


def test_the_hours_left_of_a_size_are_those_of_its_stages():
    """Half of a cell of an hour on two GPUs, in two stages."""
    state = CellState(0, "1m-cat", 10, 5, state="failed")
    now = Status("stage", "/s", [state], counts=dict.fromkeys(grid.LETTERS, 0))
    cells = [SimpleNamespace(path=Path("/s/cat"), parents=())], ""
    request = SimpleNamespace(site=SimpleNamespace(scratch=Path("/s")), cells_or_names=lambda: cells)
    row = grid.Row(request, now, {"SIZES": ["1m"], "TRAITS": ["cat"]}, {"1m-cat": 3600.0}, {"1m-cat": 2})
    lines = grid.table("CONFIG=x", [row, row]).splitlines()
    assert [line.split()[-1] for line in lines if "stage" in line and "0/1" in line] == ["1.00", "1.00"]
    assert "1m: 2.00 GPU-hours left" in [line.strip() for line in lines]


def test_a_look_at_all_stages_looks_at_each_cell_once_and_the_next_one_again(world, monkeypatch):
    pipeline, looked = load(world / "whole.yaml"), []
    here = Site("local", world / "scratch", world / "cache", world / "output", 2, "cpu", {})
    requests = requests_of(pipeline, here)
    scanned = extent.scan
    monkeypatch.setattr(extent, "scan", lambda path, *more: looked.append(path) or scanned(path, *more))
    monkeypatch.setattr("lib.cluster.live.slurm.has_slurm", lambda: False)
    monkeypatch.setattr("lib.cluster.status.slurm.has_slurm", lambda: False)
    assert [row.now.counts["done"] for row in statuses(requests)] == [2, 2, 3, 2]
    assert len(looked) == len(set(looked)) == 10
    cell = requests[0].cells[0]
    (marker, *_), aside = sorted(cell.path.glob("*.json")), world / "aside"
    marker.rename(aside)
    assert [row.now.counts["done"] for row in statuses(requests)] == [1, 2, 3, 2]
    aside.rename(marker)
