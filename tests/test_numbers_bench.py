"""The rungs of number generation, on shapes of a CPU and by transformers: what is printed, and when it stops."""

import json
import sys

import pytest

from lib.bench import numbers
from lib.bench.shapes import SHAPES, Shape
from lib.models.engine import Setting
from lib.models.engine_transformers import TransformersEngine


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(SHAPES, "nano", Shape(2, 32, 64, 4, 2, 8, 1500, 1e-6, True, True))
    monkeypatch.setitem(numbers.ROWS, "nano", 24)
    monkeypatch.setattr(numbers, "TOKENS", 5)
    monkeypatch.setattr(numbers, "free", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "nano"


def test_the_job_is_measured_whole(nano):
    with numbers.teacher(nano) as (folder, path, ids):
        assert len(ids) == 24 and min(map(len, ids)) > 20
        found = numbers.job(folder, nano, "transformers")
        known = json.loads((path / "tokenizer.json").read_text())
    assert found["rows_per_s_after_load"] > 0 and 0 < found["engine_share_of_wall"] <= 1
    assert len(found["rows_per_s_of_a_batch"]) == 2  # closed batches
    ids = {*known["model"]["vocab"].values(), *(one["id"] for one in known["added_tokens"])}
    assert ids == set(range(1500))  # random weights draw any token


def test_a_closed_batch_is_measured_twice_and_compared(nano, monkeypatch):
    def plain(setting, count):
        assert count == 2 and setting.more == {"max_num_seqs": 8}
        return TransformersEngine(Setting(setting.folder, "float32", 8, 512))

    monkeypatch.setattr(numbers, "Engines", plain)
    with numbers.teacher(nano) as (_, path, ids):
        found = numbers.batch(path, ids, 2, {"max_num_seqs": 8}, {})
    assert found["same_text_again"] == "24 of 24" and len(found["rows_per_s"]) == 2


def test_what_fails_or_comes_too_late_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(numbers, "RUNG_SECONDS", 50.0)
    clock = numbers.Clock()
    clock.measure("good", lambda: {"rows_per_s": 1})
    clock.measure("bad", lambda: sys.exc_info()[0].nothing)
    clock.measure("late", lambda: 1, needs=60.0)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["measured"] for line in lines] == ["good", "bad", "late"]
    assert lines[0]["result"] == {"rows_per_s": 1} and lines[1]["result"].startswith("AttributeError")
    assert lines[2]["result"].startswith("left out: ")
