"""Cells that read from others: how far they are is known from one look, however many of them wait for the same."""

from pathlib import Path

import numpy as np
import pytest

from lib.cluster import status as status_module
from lib.cluster.status import status
from lib.run import extent as extent_module
from lib.run.extent import extent, settled
from lib.run.heartbeat import Heartbeat, heartbeats
from lib.store import Cell, Column, commit

SCHEMA = {"row": Column("int32")}


def cell(folder: Path, stage: str, name: str, rows: int | None, *parents: Cell) -> Cell:
    return Cell(0, name, rows, "5a" * 32, folder / stage / "cells" / f"{name}-5a5a5a5a", parents)


def put(one: Cell, start: int, stop: int, rows: int) -> None:
    """A shard by an attempt that knew the cell to have so many rows."""
    made = {"attempt": "a", "job": "", "host": "h", "gpus": 0, "versions": {}, "rows": rows}
    commit(one.path, one.digest, start, stop, SCHEMA, {"row": np.arange(start, stop, dtype=np.int32)}, made=made)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were looked into."""
    seen, scan = [], extent_module.scan
    monkeypatch.setattr(extent_module, "scan", lambda path, *more: (seen.append(path), scan(path, *more))[1])
    return seen


@pytest.mark.parametrize(
    "shards, known, said, left, bad",
    [
        ([(0, 4), (4, 6)], 6, 6, [], 0),
        ([(0, 4)], 6, 6, [(4, 6)], 0),
        ([(0, 4), (4, 6)], None, 6, [], 0),  # whole by its own word, before its parent's rows are known
        ([(0, 4)], None, 6, None, 0),
        ([(0, 4), (4, 6)], 9, 6, [], 0),  # and after the parent has got more
        ([(0, 4), (4, 6)], 5, 9, [(4, 5)], 1),  # a parent with fewer: what lies beyond does not hold
        ([], None, 6, None, 0),
    ],
)
def test_a_childs_folder_is_looked_into_once(tmp_path, scans, shards, known, said, left, bad):
    parent = cell(tmp_path, "write", "cat", 6)
    child = cell(tmp_path, "judge", "cat", known, parent)
    for start, stop in shards:
        put(child, start, stop, said)
    found = extent(child)
    assert (found.left, len(found.bad)) == (left, bad)
    assert found.done == sum(b - a for a, b in shards if known is None or left == [] or b <= known)
    assert len(scans) == 1 + bool(bad)  # again only to say what does not hold
    scans.clear()
    assert extent(child, deep=True, schema=SCHEMA) == found and len(scans) == 2  # a look, then every byte
    scans.clear()
    assert settled(child).rows == (said if left == [] else known) and len(scans) == 1


def test_heartbeats_of_a_stage_are_read_once_for_all_that_wait_for_it(tmp_path, monkeypatch):
    parent, read = cell(tmp_path, "write", "cat", 6), []
    monkeypatch.setattr(status_module, "heartbeats", lambda folder: (read.append(folder.name), heartbeats(folder))[1])
    Heartbeat(parent.folder / "tasks", parent, 0).beat("failed", error="no room")
    children = [cell(tmp_path, "judge", f"cat-{n}", None, parent) for n in range(5)]
    now = status("judge", children)
    assert now.counts["blocked"] == 5 and all("it failed: no room" in child.note for child in now.cells)
    assert sorted(read) == ["judge", "write"]
