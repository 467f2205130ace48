"""Records whose fields have wrong types: of attempts, submissions, fetched inputs and sample sets. None is believed."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_store import DIGEST, flip

from lib.base.atomic import sha256_file, write_json
from lib.base.errors import UserError
from lib.base.process import HOST, pid_started
from lib.cluster import local
from lib.cluster.live import Submission, jobs_of, submissions
from lib.cluster.show import table
from lib.cluster.status import status
from lib.inputs.records import (
    DatasetInput,
    ModelInput,
    dataset_input,
    model_folder,
    model_input,
    save_dataset,
    save_model,
)
from lib.inputs.samples import Rows, read_samples, samples_folder, samples_input, save_samples
from lib.run.heartbeat import Heartbeat, heartbeats
from lib.run.task import freeze
from lib.store import Cell

WRONG = [None, True, [], {}, -1, 10**30, 1e999, float("nan"), "\ud800"]
WORDS, NUMBERS = [*WRONG, 5], [*WRONG, "5"]
DEEP = "[" * 100_000


def said(facts: dict) -> str:
    """As JSON that a person could have typed: what json.dumps calls Infinity is 1e999 there."""
    return json.dumps(facts).replace("Infinity", "1e999")


@pytest.fixture
def cell(tmp_path) -> Cell:
    return Cell(0, "owl", 24, DIGEST, tmp_path / "run" / "cells" / "owl-abababab")


def test_a_heartbeat_of_wrong_types_is_none(cell, monkeypatch):
    monkeypatch.setenv("SUITE_SLURM", "no")
    folder = cell.path.parent.parent
    beat = Heartbeat(folder / "tasks", cell, 0)
    beat.beat("running", error="")
    facts = json.loads(beat.path.read_text())
    assert status("run", [cell]).cells[0].state == "running"
    words = {"cell", "digest", "state", "job", "host", "node", "pid_started", "log", "error"}
    for key in [*words, "started", "updated", "pid"]:
        for value in WORDS if key in words else NUMBERS:
            beat.path.write_text(said({**facts, key: value}))
            assert heartbeats(folder) == {}, (key, value)
            now = status("run", [cell])
            assert now.cells[0].state == "todo" and table(now, "CONFIG=x", ("a", "b")).encode()
    for text in (DEEP, "", "[]", "\x00", "9" * 5000):
        beat.path.write_text(text)
        assert heartbeats(folder) == {}
    beat.path.write_text(json.dumps({k: facts[k] for k in ("cell", "digest", "state", "started")}))
    assert status("run", [cell]).cells[0].state == "stale"


def test_a_submission_of_wrong_types_is_none(cell):
    folder = cell.path.parent.parent
    for number, record in enumerate(
        [{"job": w, "time": 1.0} for w in WORDS] + [{"job": "7", "time": w} for w in NUMBERS]
    ):
        (folder / "submissions").mkdir(parents=True, exist_ok=True)
        (folder / "submissions" / f"{number}.json").write_text(said(record))
    good = {"job": "4711", "array": "0-3", "config": "a.yaml", "overrides": ["max_rows=3"], "time": time.time()}
    write_json(folder / "submissions" / "good.json", good)
    assert submissions(folder) == [Submission(**good)] and jobs_of(folder, []) == {"4711"}


def test_a_queue_of_wrong_types_is_none(cell):
    folder, me = cell.path.parent.parent, os.getpid()
    queue = folder / "queue" / "local-1"
    queue.mkdir(parents=True, mode=0o700)
    who = {"pid": me, "pid_started": pid_started(me), "host": HOST}
    tasks = freeze(folder, [[cell]])
    plan = {"tasks": tasks, "command": ["true"], "label": "run", "gpus": 0, "workers": 1}
    write_json(queue / "plan.json", plan)
    write_json(queue / "dispatcher.json", who)
    there = [(0, ("owl",), "PENDING", "local-1")]
    assert local.tasks(folder) == there
    for name, facts in (("plan.json", plan), ("dispatcher.json", who)):
        for key, value in facts.items():
            for wrong in NUMBERS if isinstance(value, int) else WORDS:
                if wrong == [] and isinstance(value, list):
                    continue
                (queue / name).write_text(said({**facts, key: wrong}))
                assert local.tasks(folder) == [], (key, wrong)
        write_json(queue / name, facts)


def every_wrong(record: object) -> list[str]:
    """The record with one field wrong, or missing, or one too many."""
    facts = asdict(record)
    texts = [said({k: v for k, v in facts.items() if k != key}) for key in facts] + [said({**facts, "more": 1}), DEEP]
    for key, value in facts.items():
        wrong = NUMBERS if isinstance(value, int) else [w for w in WORDS if w != {}] if value != {} else WORDS[4:]
        texts += [said({**facts, key: w}) for w in wrong]
    return texts


def test_inputs_of_wrong_types_are_not_fetched(tmp_path):
    data = DatasetInput("acme/cat", "main", "c" * 40, "train", 1, "0" * 64, 40, 3, 4)
    save_dataset(tmp_path, data, b"{}\n")
    record = next((tmp_path / "inputs" / "datasets").glob("*/input.json"))
    assert dataset_input(tmp_path, "acme/cat", "main", "train") == data
    for text in every_wrong(data):
        record.write_text(text)
        with pytest.raises(UserError, match="dataset acme/cat at revision main is not fetched; run `make fetch`"):
            dataset_input(tmp_path, "acme/cat", "main", "train")
    model = ModelInput("acme/tiny", "main", "c" * 40, "/x", "c" * 40, 1, 2, 3, 4, files={"model.safetensors": "0" * 64})
    save_model(tmp_path, model)
    record = model_folder(tmp_path, "acme/tiny", "main") / "input.json"
    assert model_input(tmp_path, "acme/tiny", "main") == model
    for text in [*every_wrong(model), said({**asdict(model), "files": {"model.safetensors": 5}})]:
        record.write_text(text)
        with pytest.raises(UserError, match="model acme/tiny at revision main is not fetched; run `make fetch`"):
            model_input(tmp_path, "acme/tiny", "main")


@pytest.fixture
def sample_set(tmp_path):
    rows = Rows([[1, 2, 3], [4]], ["a", "b"], ["0" * 64] * 2, [False, True])
    return save_samples(
        tmp_path, "toxic", DIGEST, rows, source="acme/toxic", commit="c" * 40, attributes={"commit": "c"}
    )


def test_sample_sets_of_wrong_types_are_not_prepared(tmp_path, sample_set):
    record = samples_folder(tmp_path, "toxic", DIGEST) / "input.json"
    assert samples_input(tmp_path, "toxic", DIGEST, "acme/toxic") == sample_set
    for text in [*every_wrong(sample_set), said({**asdict(sample_set), "name": "other"})]:
        record.write_text(text)
        with pytest.raises(UserError, match="samples toxic are not prepared; run `make fetch`"):
            samples_input(tmp_path, "toxic", DIGEST, "acme/toxic")


def fewer(f: h5py.File) -> None:
    del f["lengths"]
    f["lengths"] = np.array([3], np.int32)


def more(f: h5py.File) -> None:
    del f["lengths"]
    f["lengths"] = np.array([3, 2], np.int32)


def linked(f: h5py.File) -> None:
    del f["ids"]
    f["ids"] = h5py.ExternalLink("/etc/hostname", "ids")


@pytest.mark.parametrize("change", [fewer, more, linked, lambda f: f.__delitem__("held_out"), None])
def test_a_set_that_its_record_vouches_for_and_that_is_another(tmp_path, sample_set, change):
    path = samples_folder(tmp_path, "toxic", DIGEST) / "samples.h5"
    assert [list(ids) for ids in read_samples(tmp_path, sample_set).ids] == [[1, 2, 3]]
    if change:
        with h5py.File(path, "a") as f:
            change(f)
    else:
        flip(path)
        path.write_bytes(b"x" + path.read_bytes())
    write_json(path.with_name("input.json"), asdict(sample_set) | {"sha256": sha256_file(path)})
    with pytest.raises(UserError, match=r"samples.h5 is no set of samples .*`make fetch` again"):
        read_samples(tmp_path, samples_input(tmp_path, "toxic", DIGEST, "acme/toxic"))
    assert Path(path).exists()
