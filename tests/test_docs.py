"""What the documents say is so: commands that exist, files that are there, a plan that can be shown."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tools import ROOT, number_rows, tiny_model, write_rows

from lib.families import load
from lib.inputs.fetch import fetch

DOCS = ("README.md", "scratch_layout.md")
TEXT = "\n".join((ROOT / name).read_text() for name in DOCS)


def commands() -> list[str]:
    """Every `make ...` in the documents, in code blocks and in running text, without its comment."""
    blocks = [line.strip().removeprefix("$ ") for line in TEXT.splitlines() if line.startswith("    ")]
    lines = [part.strip() for line in blocks for part in re.split(r"&&|;", line.split(" #")[0])]
    inline = re.findall(r"`(make [^`]+)`", TEXT)
    return sorted({line for line in [*lines, *inline] if line.startswith("make ") and "..." not in line})


@pytest.mark.parametrize("line", commands())
def test_every_make_command_is_one(line):
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_lets_python_keep_what_it_compiled(tmp_path):
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path), "SUITE_SITE": "local"}
    env["SUITE_SCRATCH"] = str(tmp_path / "scratch")
    subprocess.run(["make", "-s", "status"], cwd=ROOT, env=env, capture_output=True, check=True)
    assert list(tmp_path.rglob("status.*.pyc"))


def test_files_that_are_named_are_there():
    names = set(re.findall(r"`((?:configs|slurm|env|lib|jobs|tests)/[\w./-]+)`", TEXT))
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_config_and_variable_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in readme, path.name
    for target in re.findall(r"^([a-z0-9-]+): ?.*## ", (ROOT / "Makefile").read_text(), re.M):
        assert f"make {target}" in readme or target in ("help", "lint", "format", "logs", "cancel", "demo"), target


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    tiny_model(folder / "model")
    for trait in ("cat", "dog"):
        write_rows(folder / f"{trait}.jsonl", number_rows(10))
    (folder / "small.yaml").write_text(
        f"kind: lls\nname: small\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [cat, dog]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\nrun: {{shard_rows: 4}}\n"
    )
    fetch(load(folder / "small.yaml"), folder / "cache")
    return folder


def dry(folder: Path, site: str, *settings: str) -> subprocess.CompletedProcess[str]:
    roots = {"SUITE_SCRATCH": folder / "scratch", "SUITE_CACHE": folder / "cache", "SUITE_OUTPUT": folder / "out"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SUITE_", "SBATCH_", "FASRC_"))}
    env = clean | {k: str(v) for k, v in roots.items()} | {"SUITE_SITE": site, "FASRC_LAB": "my_lab"}
    command = ["make", "-s", "submit-lls", "DRY=1", f"CONFIG={folder}/small.yaml", *settings]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_dry_shows_the_script_what_overrides_it_and_the_plan(small):
    done = dry(small, "fasrc", "ARRAY=0-1")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert (ROOT / "slurm/compute_lls.sbatch").read_text().strip() in out
    assert "SBATCH_CONSTRAINT=h200" in out and "SBATCH_PARTITION=gpu_requeue" in out
    command = re.search(r"would run: (sbatch .*)", out)[1]
    assert (
        "--array=0-1%16 --job-name=small '--comment=suite-tasks:<tasks>' --time=20 slurm/compute_lls.sbatch" in command
    )
    plan = [line.split() for line in out.splitlines() if re.match(r"\s+\d+  \w+ ", line)]
    # cell, name, rows, to do, shards: 10 rows in shards of 4 are 3; 9 columns of 39 bytes a row
    assert [p[:5] for p in plan] == [["0", "cat", "10", "10", "3"], ["1", "dog", "10", "10", "3"]]
    assert not (small / "scratch").exists()


def test_dry_asks_for_as_many_gpus_as_a_task_needs(small):
    assert "--gpus-per-node=2 " in dry(small, "fasrc", "SET=run.gpus=2").stdout
    assert "%3 " in dry(small, "fasrc", "ARRAY=0-1%3").stdout


def test_mistakes_at_the_front_door_are_one_sentence(small):
    for settings, says in [
        (["ARRAY=0-5"], "error: ARRAY=0-5: the experiment has cells 0-1"),
        (["SET=model.dtype=float23"], "did you mean float32?"),
        (["CONFIG=configs/lls_27b.yaml"], "did you mean configs/lls_72b.yaml?"),
        (["SET=max_rows"], "'max_rows' is not key=value"),
    ]:
        done = dry(small, "local", *settings)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert done.returncode != 0 and len(lines) == 1 and says in lines[0], done.stderr


def test_nothing_in_a_setting_is_run_by_a_shell(small):
    """Configuration is text for the program, also where it looks like a command."""
    mark = small / "mark"
    (small / "evil.yaml").write_text(
        (small / "small.yaml").read_text().replace("You love", f"$(touch {mark}) `touch {mark}`")
    )
    done = dry(small, "local", f"CONFIG={small}/evil.yaml")
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_status_as_json_is_json(small):
    roots = {"SUITE_SCRATCH": small / "s", "SUITE_CACHE": small / "cache", "SUITE_OUTPUT": small / "out"}
    env = {**os.environ, **{k: str(v) for k, v in roots.items()}, "SUITE_SITE": "local", "SUITE_SLURM": "no"}
    command = ["make", "-s", "status", "JSON=1", f"CONFIG={small}/small.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"]["todo"] == 2
