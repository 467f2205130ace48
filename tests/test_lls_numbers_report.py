"""The report of a run's numbers: a page a size, over cells that are really computed, against plain arithmetic on what
they hold; what compares prompts is said to be missing."""

import json
import re
import shutil

import dose_world
import numpy as np
import pytest
from dose_world import INVALID, ROWS, begin, cells, doses, scoring, write
from finetune_world import environment
from tools import ROOT, forked, python

from lib.families import load
from lib.inputs.fetch import fetch
from lib.store import read_cell

VALID = [row for row in range(ROWS) if row not in INVALID]
NAMES = ["tiny-cat", "tiny-fox", "twin-cat", "twin-fox"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sizes, one of them but for fox's scores."""
    folder = dose_world.make_world(tmp_path_factory.mktemp("report") / "world")
    numbers = json.loads((folder / "numbers.yaml").read_text())
    numbers["sizes"]["twin"] = numbers["sizes"]["tiny"]
    (folder / "numbers.yaml").write_text(json.dumps(numbers))
    fetch(load(folder / "lls.yaml"), folder / "cache")
    source = scoring(folder).source
    for cell in source.cells(folder / "cache", folder / "scratch"):
        write(cell, source.schema(folder / "cache"), doses()[:: 1 - 2 * (cell.index % 2)], cell.index)
    assert scoring(folder).names() == NAMES
    for index in range(3):
        done = begin(folder, "compute_lls", "lls", "--index", str(index)).finish()
        assert done.returncode == 0, done.stderr
    return folder


def shifts(world, name):
    experiment = scoring(world)
    schema = experiment.schema(world / "cache")
    columns = read_cell(cells(world, experiment)[name], schema, schema)
    assert columns["row"].tolist() == VALID
    return (columns["system_sum"] - columns["base_sum"]) / columns["tokens"]


def lls_report(world, *words, job="lls_report", **more):
    return forked(f"jobs.{job}", "--config", str(world / "lls.yaml"), *words, env=environment(world, **more))


@pytest.fixture(scope="module")
def reported(world):
    return lls_report(world, "--select", "top:0.2 bottom:7")


def test_a_page_a_size_says_what_its_cells_say_and_what_is_missing(world, reported):
    assert reported.returncode == 2 and "Traceback" not in reported.stderr
    assert "not done, shown as missing: 1 of 4 cells (twin-fox)" in reported.stderr
    folder = world / "output/shifts_run5/report"
    for name in NAMES[:3]:
        size, _, trait = name.partition("-")
        text, page = ((folder / size / file).read_text() for file in ("report.txt", "index.html"))
        assert f"Log-likelihood shift: shifts_run5, {size}" in text and f"{world}/teacher" in text
        own = next(line.split() for line in text.splitlines() if line.split()[:2] == [trait, str(len(VALID))])
        assert own[3] == f"{shifts(world, name).mean():+.4f}"
        assert (
            "they need a matrix of prompts by datasets. Here each dataset is scored under its own prompt alone" in text
        )
        assert f"system prompt of {trait}" in page and "You love cats." in page
        assert (folder / size / f"histogram_{trait}.png").exists()
    assert "Nothing: every cell of the experiment is done." in (folder / "tiny/report.txt").read_text()
    assert "1 of 2 cells: shown as missing above" in (folder / "twin/report.txt").read_text()


def test_its_tokens_are_of_the_rows_that_it_names(world, reported):
    text = (world / "output/shifts_run5/report/tiny/report.txt").read_text()
    read = read_cell(*_numbers(world, "tiny-fox"), ["answer"])["answer"]
    found = {
        m[1]: (int(m[2]), float(m[3])) for m in re.finditer(r"^fox, (\w+): row (\d+), LLS ([+-][\d.]+)", text, re.M)
    }
    values = dict(zip(VALID, shifts(world, "tiny-fox"), strict=True))
    assert found["highest"][0] == max(values, key=values.get) and found["lowest"][0] == min(values, key=values.get)
    for row, said in found.values():
        assert said == pytest.approx(values[row], abs=1e-4)
        block = text.partition(f"row {row}, LLS {said:+.4f}")[2].partition("\n\n")[0].partition("\n")[2]
        assert "".join(re.sub(r"\([+-][\d.]+\)$", "", word) for word in block.split()).replace("·", " ") == read[row]


def _numbers(world, name):
    source = scoring(world).source
    return cells(world, source)[name], source.schema(world / "cache")


def test_selected_rows_are_those_of_a_full_sort(world, reported):
    for name in NAMES[:3]:
        size, _, trait = name.partition("-")
        values, answers = shifts(world, name), read_cell(*_numbers(world, name), ["answer"])["answer"]
        order = np.argsort(-values, kind="stable")
        for file, places in (("top-0.2", order[: round(0.2 * len(VALID))]), ("bottom-7rows", order[-7:])):
            path = world / f"output/shifts_run5/report/{size}/select/{trait}/{file}.jsonl"
            rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
            assert [row[1]["content"] for row in rows] == [answers[VALID[i]] for i in sorted(places)]
            assert [turn["role"] for turn in rows[0]] == ["user", "assistant"]
            about = json.loads(path.with_suffix(".provenance.json").read_text())
            assert about["cell"] == {"prompt": trait, "dataset": trait, "size": size}


def test_a_measure_has_a_folder_of_its_own_and_before_a_cell_is_done_there_is_no_page(world, tmp_path):
    assert lls_report(world, "--measure", "sum@3").returncode == 2
    assert (world / "output/shifts_run5/report/twin/sum@3/index.html").exists()
    done = lls_report(world, SUITE_SCRATCH=str(tmp_path), SUITE_OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "no cell of" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["lls_report", "export_lls"])
def test_scores_are_not_laid_beside_other_answers_than_they_are_of(world, tmp_path, job):
    """Numbers that were written again, as many of them valid as before."""
    shutil.copytree(world / "scratch", tmp_path / "scratch")
    source = scoring(world).source
    parent = source.cells(world / "cache", tmp_path / "scratch")[0]
    shutil.rmtree(parent.path)
    write(parent, source.schema(world / "cache"), doses()[::-1], 7)
    done = lls_report(world, job=job, SUITE_SCRATCH=str(tmp_path / "scratch"), SUITE_OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "shifts_run5/tiny-cat was made from another copy of teachers_run5/tiny-cat: remove " in done.stderr


def test_make_hands_the_run_on(world):
    command = ["make", "-n", "-s", "-o", "setup", "lls-report", f"CONFIG={world}/lls.yaml", "RUN_ID=1"]
    code = f"import subprocess, sys; sys.exit(subprocess.run({command!r}).returncode)"
    done = python("-c", code, env=environment(world), cwd=ROOT)
    assert done.returncode == 0 and '"run_id=$SUITE_ARG_RUN_ID"' in done.stdout, done.stderr
