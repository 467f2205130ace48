"""Files that are not what their record says, although size and sha256 are right; records that are no records."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzzing import as_nobody
from test_store import DIGEST, SCHEMA, cut, put, rewrite, table

from lib.base.errors import UserError
from lib.store import Cell, gaps, merge, scan
from lib.store.markers import set_aside
from lib.store.merge import merged_is_current

ROWS = 24


@pytest.fixture
def cell(tmp_path) -> Cell:
    return Cell(0, "owl", ROWS, DIGEST, tmp_path / "cells" / "owl-abababab")


def vouch(marker: Path, file: Path) -> None:
    """Let a marker tell the truth about a file's bytes."""
    rewrite(marker, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size)


def short(f: h5py.File) -> None:
    for name, values in cut(table(ROWS), 0, 5).items():
        del f[name]
        f[name] = values


def replace(name: str, values: object, **how: object) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        del f[name]
        f.create_dataset(name, data=values, **how)

    return change


def link(name: str, target: Callable[[h5py.File], object]) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        new = target(f)
        del f[name]
        f[name] = new

    return change


def beside(f: h5py.File) -> Path:
    """The same column in another file: what a link could point to and be believed."""
    path = Path(f.filename).with_name("other.h5")
    with h5py.File(path, "w") as other:
        other["x"] = table(ROWS)["x"]
    return path


def soft(f: h5py.File) -> None:
    f.move("x", "y")
    f["x"] = h5py.SoftLink("/y")


def virtual(f: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS,), "float64")
    layout[:] = h5py.VirtualSource(beside(f), "x", (ROWS,))
    del f["x"]
    f.create_virtual_dataset("x", layout)


def external(f: h5py.File) -> None:
    path = Path(f.filename).with_name("other.raw")
    path.write_bytes(table(ROWS)["x"].tobytes())
    del f["x"]
    f.create_dataset("x", (ROWS,), "float64", external=[(str(path), 0, ROWS * 8)])


def empty(f: h5py.File) -> None:
    del f["x"]
    f.create_dataset("x", (ROWS,), "float64", chunks=(ROWS,))


LIES = {
    "5 rows of 24": ("has shape (5,), not (24,)", short),
    "another digest of its own": ("its digest is cdcd", lambda f: f.attrs.__setitem__("digest", "cd" * 32)),
    "other rows of its own": ("its stop is 25, not 24", lambda f: f.attrs.__setitem__("stop", 25)),
    "no attribute": ("its start is None", lambda f: f.attrs.__delitem__("start")),
    "a column less": ("not the experiment's (x)", lambda f: f.__delitem__("x")),
    "a column more": ("not the experiment's (z)", lambda f: f.__setitem__("z", [1])),
    "another type": ("x holds float32, not float64", replace("x", np.zeros(ROWS, np.float32))),
    "another shape": ("x has shape (24, 1)", replace("x", np.zeros((ROWS, 1)))),
    "a value too few of those counted": ("t has shape", replace("t", table(ROWS)["t"][1:])),
    "counts below zero": ("t would have fewer values", replace("n", np.full(ROWS, -1, np.int32))),
    "never written": ("x was never written", empty),
    "a soft link": ("x points elsewhere", soft),
    "an external link": ("x points elsewhere", link("x", lambda f: h5py.ExternalLink(beside(f), "x"))),
    "a second name": ("is a second name", link("x", lambda f: f["row"])),
    "a folder that holds itself": ("is a second name", lambda f: f.create_group("g").__setitem__("g", f["/"])),
    "a virtual dataset": ("x is not stored in the file itself", virtual),
    "external storage": ("x is not stored in the file itself", external),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_its_marker_vouches_for_and_that_is_another(cell, kind):
    marker = put(cell, table(ROWS), 0, ROWS)
    with h5py.File(marker.file, "a") as f:
        LIES[kind][1](f)
    vouch(marker.path, marker.file)
    done, bad = scan(cell.path, DIGEST, deep=True, schema=SCHEMA)
    assert done == [] and len(bad) == 1 and LIES[kind][0] in bad[0][1], bad
    assert len(scan(cell.path, DIGEST)[0]) == 1  # a look at the marker and the size does not read it
    with pytest.raises(UserError, match=re.escape("rows 0-24 of 24 are not done")):
        merge(cell, SCHEMA, "{}")
    assert scan(cell.path, DIGEST) == ([], [])  # set aside: now it can be done again


@pytest.mark.parametrize("kind", [k for k in LIES if "link" in k or "storage" in k or "virtual" in k or "own" in k])
def test_what_can_be_seen_without_the_schema_is_seen(cell, kind):
    marker = put(cell, table(ROWS), 0, ROWS)
    with h5py.File(marker.file, "a") as f:
        LIES[kind][1](f)
    vouch(marker.path, marker.file)
    assert LIES[kind][0] in scan(cell.path, DIGEST, deep=True)[1][0][1]


def why_not(cell: Cell) -> tuple[Path, str]:
    done, [bad] = scan(cell.path, DIGEST)
    assert not done
    return bad.path, bad.reason


NONSENSE = {
    "start": [True, -1, 10**30, "0", None, 0.0, [0]],
    "stop": [True, "24", 24.0, 1e999],
    "bytes": [1e999, True, -1, 10**30, "5"],
    "seconds": [1e999, float("nan"), -1, True, "1", None, 10**400],
    "digest": [None, 5, [DIGEST]],
    "sha256": [None, 5, {}],
    "file": [None, 5, [], "\ud800"],
    "unscored": [True, -1, "many", 1e999, None],
    "made": [None, [], {"gpus": True}, {"gpus": "8"}, {"gpus": -3}, {"attempt": 5}, {"device": ["cpu"]}],
    "facts": [None, [], {"loss": True}, {"loss": 1e999}, {"loss": float("nan")}, {"who": "\ud800"}, {"x": [1]}],
    "retired": [None, "yes", {"why": "x"}, {"why": 1, "read_by": "y"}],
}


@pytest.mark.parametrize("key", NONSENSE)
def test_a_marker_of_wrong_types_cannot_be_read(cell, key):
    marker = put(cell, table(ROWS), 0, ROWS)
    good = json.loads(marker.path.read_text())
    for value in NONSENSE[key]:
        text = json.dumps({**good, key: value})
        marker.path.write_text(text.replace("Infinity", "1e999"))
        assert why_not(cell) == (marker.path, "the marker cannot be read"), value


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"start": ' * 5000, "9" * 5000, "\xff\xfe", "true"])
def test_a_marker_that_is_no_object_cannot_be_read(cell, text):
    marker = put(cell, table(ROWS), 0, ROWS)
    marker.path.write_bytes(text.encode("latin-1"))
    assert why_not(cell) == (marker.path, "the marker cannot be read")


def test_a_marker_vouches_for_its_own_file_within_the_cell(cell):
    marker = put(cell, table(ROWS), 0, 10)
    good = json.loads(marker.path.read_text())
    for change, why in {
        "file": (marker.file.name.replace("00000010", "00000011"), "another shard's file"),
        "unscored": (11, "more rows without a score"),
    }.items():
        marker.path.write_text(json.dumps({**good, change: why[0]}))
        assert why[1] in scan(cell.path, DIGEST)[1][0][1]
    marker.path.write_text(json.dumps(good))
    assert "the cell has 9 rows" in scan(cell.path, DIGEST, rows=9)[1][0][1]
    marker.file.unlink()
    marker.file.mkdir()
    rewrite(marker.path, bytes=marker.file.stat().st_size)
    assert "is not a file" in scan(cell.path, DIGEST)[1][0][1]


@pytest.mark.parametrize("kind", [k for k in LIES if "own" not in k and "attribute" not in k])
def test_a_merged_file_that_is_another_is_made_again(cell, kind):
    put(cell, table(ROWS), 0, ROWS)
    path = merge(cell, SCHEMA, "{}")
    whole = path.read_bytes()
    assert merged_is_current(cell, SCHEMA)
    with h5py.File(path, "a") as f:
        LIES[kind][1](f)
    vouch(cell.path / "merged.json", path)
    assert not merged_is_current(cell, SCHEMA)
    assert merge(cell, SCHEMA, "{}").read_bytes() == whole and merged_is_current(cell, SCHEMA)


def test_a_merged_record_that_is_nonsense_is_no_record(cell):
    put(cell, table(ROWS), 0, ROWS)
    merge(cell, SCHEMA, "{}")
    record = cell.path / "merged.json"
    good = record.read_text()
    changes = {"digest": [5, "cd" * 32], "rows": [True, 1e999, 23], "sha256": [None, 5], "bytes": ["1", -1, 10**30, 7]}
    texts = [json.dumps({**json.loads(good), key: value}) for key, values in changes.items() for value in values]
    for text in [*texts, "{}", "[]", "[" * 100_000, json.dumps({"digest": DIGEST}), "\x00"]:
        record.write_text(text)
        assert not merged_is_current(cell, SCHEMA), text[:80]
    record.write_text(good)
    assert merged_is_current(cell, SCHEMA)
    record.write_text(good.replace('"rows": 24', '"rows": 24, "more": 1'))
    assert not merged_is_current(cell, SCHEMA)


def test_gaps_of_what_was_refused_are_the_whole_cell(cell):
    marker = put(cell, table(ROWS), 0, ROWS)
    rewrite(marker.path, seconds=True)
    assert gaps(scan(cell.path, DIGEST)[0], ROWS) == [(0, ROWS)]


def test_a_bad_marker_that_may_not_be_moved_is_one_sentence():
    """As in a sticky folder, where it is somebody else's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:  # whose parents anybody may enter
        cell = Cell(0, "owl", ROWS, DIGEST, Path(outer, "owl-abababab"))
        marker = put(cell, table(ROWS), 0, ROWS)
        marker.path.write_text("{}")
        bad = scan(cell.path, DIGEST)[1]
        Path(outer).chmod(0o755)
        cell.path.chmod(0o555)
        with (
            as_nobody(),
            pytest.raises(UserError, match=f"cannot write {re.escape(str(marker.path))}: Permission denied"),
        ):
            set_aside(bad)
        cell.path.chmod(0o755)
        set_aside(bad)
        assert not marker.path.exists()
