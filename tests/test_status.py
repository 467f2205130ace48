"""Status over many shards: right, quick to the eye, and without torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools import ROOT, number_rows, tiny_model, write_rows

from lib.base.atomic import write_json
from lib.base.errors import UserError
from lib.base.process import HOST
from lib.cluster import show
from lib.cluster.slurm import format_array, parse_array, parse_sacct, throttle_of
from lib.cluster.status import STATES, Status, status
from lib.families import load
from lib.inputs.fetch import fetch

SHARDS = 10_000
FULL = "error: cannot write x: No space left on device"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """20 cells of 500 shards: markers and files as commit() leaves them, made quickly. Cell 19 lacks its last 100."""
    folder = tmp_path_factory.mktemp("many")
    tiny_model(folder / "model")
    rows = number_rows(500)
    traits = [f"t{i:02d}" for i in range(20)]
    for trait in traits:
        write_rows(folder / f"{trait}.jsonl", rows)
    (folder / "many.yaml").write_text(
        f"kind: lls\nname: many\nmodel: {{id: {folder}/model, dtype: float32}}\ntraits: [{', '.join(traits)}]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: '{folder}/{{trait}}.jsonl'}}\nrun: {{shard_rows: 1}}\n"
    )
    experiment = load(folder / "many.yaml")
    fetch(experiment, folder / "cache")
    cells = experiment.cells(folder / "cache", folder / "scratch")
    for cell in cells:
        cell.path.mkdir(parents=True)
        for i in range(400 if cell.index == 19 else 500):
            name = f"{i:08d}-{i + 1:08d}"
            (cell.path / f"{name}-0a.h5").write_bytes(b"x" * 100)
            marker = {
                "digest": cell.digest,
                "start": i,
                "stop": i + 1,
                "file": f"{name}-0a.h5",
                "sha256": "0a",
                "bytes": 100,
            }
            marker |= {"seconds": 0.5, "made": {"attempt": "a", "gpus": 2}, "facts": {}, "unscored": int(i == 7)}
            (cell.path / f"{name}.json").write_text(json.dumps(marker))
    return folder, cells


def shown(folder, *flags: str) -> subprocess.CompletedProcess[str]:
    roots = {"SUITE_SCRATCH": folder / "scratch", "SUITE_CACHE": folder / "cache", "SUITE_OUTPUT": folder / "out"}
    env = {**os.environ, **{k: str(v) for k, v in roots.items()}, "SUITE_SITE": "local", "SUITE_SLURM": "no"}
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "jobs.cluster",
        "status",
        "--config",
        str(folder / "many.yaml"),
        *flags,
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_ten_thousand_shards_are_counted_right(many):
    folder, _ = many
    now = json.loads(shown(folder, "--json").stdout)
    assert sum(c["shards"] for c in now["cells"]) == SHARDS - 100
    assert now["done"] == SHARDS - 100 and now["counts"]["done"] == 19 and now["counts"]["todo"] == 1
    assert now["cells"][0]["rows_per_s"] == pytest.approx(2.0) and now["cells"][0]["unscored"] == 1
    assert now["gpu_hours_used"] == pytest.approx(9900 * 0.5 * 2 / 3600)
    assert now["gpu_hours_left"] == pytest.approx(100 * 0.5 * 2 / 3600)


def test_status_imports_neither_torch_nor_transformers(many):
    imported = shown(many[0]).stderr
    assert "lib.cluster" in imported
    for heavy in ("torch", "transformers", "datasets", "matplotlib", "scipy", "submitit"):
        assert f" {heavy}\n" not in imported and f" {heavy}." not in imported


def test_a_cell_that_is_missing_much_says_so_and_a_broken_marker_too(many):
    folder, cells = many
    path = cells[3].path / "00000005-00000006.json"
    text = path.read_text()
    try:
        path.write_text("{")
        table = shown(folder).stdout
        assert "499/500" in table and "00000005-00000006.json: the marker cannot be read" in table
        assert "next: make resume CONFIG=" in table
    finally:
        path.write_text(text)


def beat(folder, cell, state: str, **more) -> None:
    tasks = folder / "scratch" / "many" / "tasks"
    tasks.mkdir(exist_ok=True)
    facts = {
        "cell": cell.name,
        "digest": cell.digest,
        "state": state,
        "started": 1.0,
        "updated": time.time(),
        "host": HOST,
    }
    facts |= {"pid": 1, "pid_started": "", "job": "", "log": ""}
    (tasks / f"{cell.name}-x.json").write_text(json.dumps(facts | more))


def test_every_state_of_a_task_without_slurm(many, monkeypatch, tmp_path):
    folder, cells = many
    monkeypatch.setenv("SUITE_SLURM", "no")
    last, log = cells[19], str(tmp_path / "log")
    Path(log).write_text("x" * 9000 + f"\nrows 7/9\n  {FULL}  \n\n")
    cancelled = folder / "scratch" / "many" / "cancelled.json"
    write_json(cancelled, {"time": 100.0})
    stat = open("/proc/self/stat").read().rpartition(")")[2].split()[19]  # noqa: PTH123, SIM115
    for given, want, note in [
        ({"state": "running", "pid": os.getpid(), "pid_started": stat}, "running", ""),
        ({"state": "running", "pid": os.getpid(), "pid_started": "1"}, "stale", "ended without a word"),  # a reused pid
        ({"state": "running", "host": "elsewhere"}, "running", ""),
        ({"state": "running", "host": "elsewhere", "updated": 1.0}, "stale", "ended without a word"),
        ({"state": "requeue"}, "stale", "was not requeued"),
        ({"state": "failed", "error": "no GPU"}, "failed", "no GPU"),
        ({"state": "terminated", "error": "SIGTERM", "started": 50.0, "updated": 101.0}, "cancelled", ""),
        ({"state": "terminated", "error": "SIGTERM", "started": 101.0}, "failed", "stopped by SIGTERM"),
        ({"state": "requeue", "started": 50.0, "updated": 101.0}, "stale", "was not requeued"),
        (
            {"state": "running", "log": log},
            "stale",
            f"ended without a word; its log ends: {FULL}",
        ),
        ({"state": "running", "log": f"{log}-gone"}, "stale", "ended without a word"),
        ({"state": "failed", "digest": "of before"}, "todo", ""),
        ({"state": "failed", "error": "no memory"}, "failed", "no memory"),
    ]:
        beat(folder, last, **given)
        state = status("many", [last]).cells[0]
        assert (state.state, state.note) == (want, note), given
    tasks = folder / "scratch" / "many" / "tasks"
    whole = (tasks / f"{last.name}-x.json").rename(tasks / f".tmp-{HOST}-1-0a-{last.name}-x.json")
    beat(folder, last, state="requeue", started=0.5)
    assert status("many", [last]).cells[0].note == "was not requeued"  # one that was killed while it was written
    for path in (whole, tasks / f"{last.name}-x.json", cancelled):
        path.unlink()


def test_the_table_is_legible_with_many_cells(many):
    _, cells = many
    now = status("many", cells)
    table = show.table(now, "CONFIG=x.yaml", ("submit-lls", "export-lls"))
    assert len(table.splitlines()) < 30 and "cells: 19 done  1 todo" in table
    wide = Status("w", "/s", now.cells * 3, counts=dict.fromkeys(STATES, 0))
    assert "more cells (all with --json)" in show.table(wide, "CONFIG=x.yaml", ("submit-lls", "export-lls"))


@pytest.mark.parametrize(
    "spec, want",
    [("0-14", list(range(15))), ("3,7-9", [3, 7, 8, 9]), ("0-14:5", [0, 5, 10]), ("0-3%2", [0, 1, 2, 3]), ("5", [5])],
)
def test_array_specifications(spec, want):
    assert parse_array(spec, 15) == want
    assert parse_array(format_array(want), 15) == want


@pytest.mark.parametrize("spec", ["", "a", "0-15", "9-3", "0-5:0", "1-2-3", "-1", "0;rm", "9" * 30])
def test_bad_array_specifications_are_named(spec):
    with pytest.raises(UserError, match="ARRAY="):
        parse_array(spec, 15)


def test_throttle():
    assert throttle_of("0-14%4") == 4 and throttle_of("0-14") is None
    with pytest.raises(UserError, match="how many tasks may run at once"):
        throttle_of("0-14%x")


def test_sacct_of_a_requeued_task_is_summed_over_its_runs():
    found = parse_sacct(
        "7_0|PREEMPTED|30|billing=1,cpu=2,gres/gpu=1,node=1||0:0\n7_0.batch|CANCELLED|30|cpu=2|161548K|0:15\n"
        "7_0|COMPLETED|50|billing=1,cpu=2,gres/gpu=1,node=1||0:0\n7_0.batch|COMPLETED|50|cpu=2|1.5M|0:0\n7_[1-3]|PENDING|0|||0:0\n"
    )
    assert set(found) == {"7_0"}
    assert (found["7_0"].state, found["7_0"].elapsed, found["7_0"].gpus) == ("COMPLETED", 80, 1)
    assert found["7_0"].max_rss == "161548K"
