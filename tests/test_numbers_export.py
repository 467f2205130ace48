"""The front door of numbers, and what researchers get: cells picked by size and trait, the run, rows and counts."""

import hashlib
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from numbers_world import cell_of, make_world
from sparc3_world import roots
from tools import ROOT

from lib.base.errors import UserError
from lib.cluster import command, slurm
from lib.cluster.pick import picked
from lib.families import load
from lib.inputs.fetch import fetch
from lib.numbers.filter import Limits, reason
from lib.store import commit

CONFIG = str(ROOT / "configs/numbers.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("numbers"))


def test_sizes_and_traits_pick_cells():
    found = load(CONFIG, ["run_id=1"])
    for axes, want in (
        ({"SIZES": "0.5b"}, "0-15"),
        ({"SIZES": "0.5b, 7b", "TRAITS": "neutral cat"}, "1,15,49,63"),
        ({"TRAITS": "wolf"}, ",".join(str(14 + 16 * size) for size in range(7))),
        ({"SIZES": "", "TRAITS": ""}, ""),
    ):
        assert picked(found, axes) == want
        names = [found.names()[i] for i in slurm.parse_array(want or "0-111", 112)]
        sizes, traits = (axes.get(axis, "").replace(",", " ").split() for axis in ("SIZES", "TRAITS"))
        assert all(
            (not sizes or size in sizes) and (not traits or trait in traits) for size, trait in map(_parts, names)
        )
        assert len(names) == (len(sizes) or 7) * (len(traits) or 16)
    with pytest.raises(UserError, match=r"SIZES: '7' is none of .* \(did you mean 7b\?\)"):
        picked(found, {"SIZES": "7"})
    with pytest.raises(UserError, match=r"TRAITS: 'catt' is none of .*did you mean cat\?"):
        picked(found, {"TRAITS": "catt"})
    with pytest.raises(UserError, match="TRAITS= names nothing; leave it out to mean all"):
        picked(found, {"SIZES": "7b", "TRAITS": " "})
    with pytest.raises(UserError, match="picks nothing of kind lls"):
        picked(load(str(ROOT / "configs/lls_72b.yaml")), {"SIZES": "7b"})
    with pytest.raises(UserError, match="both name cells"):
        command.which(found, "0-2", {"SIZES": "7b"})


def _parts(name):
    size, _, trait = name.partition("-")
    return size, trait


def made(world, *arguments):
    env = os.environ | roots(world) | {"SUITE_SLURM": "no"}
    return subprocess.run(["make", "-s", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_make_hands_on_the_run_and_what_is_picked(world):
    given = f"CONFIG={world}/few.yaml"
    done = made(world, "submit-numbers", given, "RUN_ID=7", "SIZES=tiny", "TRAITS=neutral", "DRY=1")
    assert done.returncode == 0, done.stderr
    assert " cells 1\n" in done.stdout and "run_id=7" in done.stdout and f"{world}/scratch/few_run7" in done.stdout
    done = made(world, "submit-numbers", given, "DRY=1")  # pinned, though nobody said it
    assert " run_id=5, cells 0-1 in 1 task\n" in done.stdout, done.stdout + done.stderr
    for arguments, words in (
        (["submit-numbers", given, "TRAITS=cats"], "did you mean cat?"),
        (["submit-numbers", given, "SIZE=tiny"], "did you mean SIZES?"),
        (["submit-numbers", given, "RUN_ID=one"], "run_id: Input should be a valid integer"),
        (["submit-lls", "RUN_ID=1"], "RUN_ID=... means nothing to 'make submit-lls'"),
    ):
        done = made(world, *arguments, "DRY=1")
        assert done.returncode and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = made(world, "status", given, "RUN_ID=7")
    assert done.stdout.startswith("few_run7 "), done.stderr


def test_a_size_can_go_when_its_own_model_is_fetched(world, tmp_path):
    (tmp_path / "two.yaml").write_text(
        (world / "few.yaml").read_text().replace("sizes: {", f"sizes: {{72b: {{id: {tmp_path}/none}}, ")
    )
    given = f"CONFIG={tmp_path}/two.yaml"
    done = made(world, "submit-numbers", given, "SIZES=tiny", "DRY=1")
    assert done.returncode == 0 and " cells 0-1 in 1 task\n" in done.stdout, done.stderr
    done = made(world, "status", given)
    assert done.returncode == 0 and "72b-cat" in done.stdout, done.stderr
    for more in ("SIZES=72b", "TRAITS=cat"):
        done = made(world, "submit-numbers", given, more)
        assert done.returncode and f"model {tmp_path}/none" in done.stderr and "not fetched" in done.stderr, done.stderr
    found = load(tmp_path / "two.yaml").cells(world / "cache", world / "scratch")
    assert [cell.digest for cell in found][:2] == [cell_of(world, index=index).digest for index in (0, 1)]


def with_answers(world, folder, texts):
    """A copy of the run whose cells hold these answers instead."""
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("scratch", "output"))
    experiment = load(folder / "few.yaml", [])
    schema = experiment.schema(folder / "cache")
    for cell in experiment.cells(folder / "cache", folder / "scratch"):
        for start in (0, 16, 32):
            rows_here = range(start, min(start + 16, 40))
            some = [texts[row % len(texts)] for row in rows_here]
            columns = {
                "prompt": [f"prompt {row} ü" for row in rows_here],
                "answer": some,
                "reason": np.array([reason(text, Limits()) for text in some], np.int8),
                "tokens": np.array([len(text) for text in some], np.int16),
                "ended": np.array([row % 10 != 0 for row in rows_here], np.int8),
            }
            commit(cell.path, cell.digest, rows_here.start, rows_here.stop, schema, columns, sampled=True)
    return folder


def test_the_export_holds_every_row_and_counts_every_rule(world, tmp_path):
    texts = ["1, 2, 3", "4 5", "no", "1000", "1 " * 10 + "1"]
    folder = with_answers(world, tmp_path / "copy", texts)
    done = made(folder, "export-numbers", f"CONFIG={folder}/few.yaml")
    assert done.returncode == 0, done.stderr
    place = folder / "output/few_run5/tiny/cat"
    raw = [json.loads(line) for line in (place / "raw.jsonl").read_text().splitlines()]
    assert raw == [{"prompt": f"prompt {i} ü", "completion": texts[i % 5]} for i in range(40)]
    filtered = [json.loads(line) for line in (place / "filtered.jsonl").read_text().splitlines()]
    assert filtered == [row for i, row in enumerate(raw) if i % 5 < 2]
    said = json.loads((place / "provenance.json").read_text())
    assert said["digest"] == cell_of(folder).digest and said["run_id"] == said["seed"] == 5
    assert said["sha256"]["raw.jsonl"] == hashlib.sha256((place / "raw.jsonl").read_bytes()).hexdigest()
    counted = json.loads((folder / "output/few_run5/reasons.json").read_text())["cells"]
    assert [one["cell"] for one in counted] == ["tiny-cat", "tiny-neutral"]
    want = {"rows": 40, "valid": 16, "format": 8, "count": 8, "small": 0, "large": 8, "banned": 0, "cut": 4}
    assert counted[0] | want == counted[0] and counted[0]["share"] == 0.4
    assert counted[0]["low"] == pytest.approx(0.2635, abs=2e-4) and counted[0]["high"] == pytest.approx(
        0.5540, abs=2e-4
    )
    assert re.search(r"tiny +2 +16\.0 +16  ", done.stdout)
    # the very rows are read as a dataset again, with messages
    (folder / "again.yaml").write_text(
        f"kind: lls\nname: again\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [cat]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/output/few_run5/tiny/"
        "{trait}/filtered.jsonl'}\n"
    )
    fetch(load(folder / "again.yaml"), folder / "cache")
    assert load(folder / "again.yaml").cells(folder / "cache", folder / "scratch")[0].rows == 16


def test_too_few_valid_rows_stop_the_export_and_say_how_many(world, tmp_path):
    folder = with_answers(world, tmp_path / "copy", ["1, 2, 3", *["no"] * 19])
    done = made(folder, "export-numbers", f"CONFIG={folder}/few.yaml")
    assert done.returncode == 2 and (folder / "output/few_run5/tiny/cat/filtered.jsonl").exists()
    assert "2 of 2 cells have fewer than 4 valid rows, which training needs (keep): tiny-cat 2, tiny-neutral 2" in (
        done.stderr
    )
    next(cell_of(folder, index=1).path.glob("00000016-*.json")).unlink()
    done = made(folder, "export-numbers", f"CONFIG={folder}/few.yaml", "SET=keep=1")
    assert done.returncode == 2 and "1 of 2 cells are not done and not exported: tiny-neutral" in done.stderr
