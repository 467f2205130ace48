"""Columns of arrays, and raw ones that are never in memory whole: plain numpy, full disks, kills, flipped bits."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from test_store import DIGEST, flip, in_small_mount
from tools import ROOT, python

from lib.base.errors import UserError
from lib.base.process import HOST
from lib.run.experiment import stored_bytes
from lib.store import Cell, Column, commit, merge, raw, read_array, scan
from lib.store.bf16 import from_bfloat16, to_bfloat16
from lib.store.columns import CHUNK_BYTES, CHUNK_ROWS, chunk_of
from lib.store.markers import sweep
from lib.store.merge import merged_is_current, rounding_of
from lib.store.raw import PIECE

WIDE = (3, PIECE // 2 + 5)  # two pieces, the second one short
SCHEMA = {
    "samples": Column("int32"),
    "a/one.up_proj": Column("float32", shape=WIDE, raw=True),
    "sumsq": Column("float64", shape=(7,)),
    "b/one.up_proj": Column("bfloat16", shape=WIDE, raw=True),
    "b/two.up_proj": Column("bfloat16", shape=(50, 30), raw=True),
}
RAW = [name for name, column in SCHEMA.items() if column.raw]


def block(row: int) -> dict[str, np.ndarray]:
    """One row; sums of these depend on the order in which they are added."""
    rng = np.random.default_rng(row)
    values = {"samples": np.array([row + 1], np.int32), "sumsq": rng.random((1, 7))}
    for name in RAW:
        shape = SCHEMA[name].shape
        values[name] = rng.standard_normal(shape, np.float32) * np.float32(10.0) ** rng.integers(-3, 4, shape[-1])
        values[name] = values[name].astype(np.float32)
    return values


def put(cell: Cell, *rows: int):
    blocks = [block(row) for row in rows]
    if len(rows) == 1:
        columns = blocks[0]
    else:
        columns = {name: (np.stack if name in RAW else np.concatenate)([b[name] for b in blocks]) for name in blocks[0]}
    return commit(cell.path, DIGEST, rows[0], rows[-1] + 1, SCHEMA, columns, seconds=1.0)


@pytest.fixture
def cell(tmp_path):
    return Cell(0, "general-0", 4, DIGEST, tmp_path / "general-0-abababab")


def test_a_raw_shard_holds_what_was_given_and_says_so(cell):
    given = block(2)
    marker = put(cell, 2)
    with h5py.File(marker.file) as f:  # as any reader would, without our code
        assert (f.attrs["digest"], f.attrs["start"], f.attrs["stop"]) == (DIGEST, 2, 3)
        assert f["samples"].fletcher32 and f["sumsq"].fletcher32
        np.testing.assert_array_equal(f["sumsq"][:], given["sumsq"])
        assert f["samples"][:].tolist() == [3]
        for name in RAW:
            assert f[name].chunks is None and f[name].shape == (1, *SCHEMA[name].shape)
        np.testing.assert_array_equal(f["a/one.up_proj"][0], given["a/one.up_proj"])
        np.testing.assert_array_equal(read_array(f["a/one.up_proj"], 0), given["a/one.up_proj"])
        for name in RAW[1:]:
            bits = to_bfloat16(given[name])
            assert f[name].dtype == np.uint16 and f[name].attrs["dtype"] == "bfloat16"
            np.testing.assert_array_equal(f[name][0], bits)
            np.testing.assert_array_equal(read_array(f[name]), from_bfloat16(bits)[None])
    raw = json.loads(marker.path.read_text())
    assert raw["bytes"] == marker.file.stat().st_size and raw["file"] == marker.file.name
    assert scan(cell.path, DIGEST, deep=True)[1] == [] and not list(cell.path.glob(".tmp-*"))


def test_the_same_values_give_the_same_file_given_at_once_or_when_asked_for(cell):
    first, given, asked = put(cell, 0).file.read_bytes(), block(0), []

    def later(name):
        return lambda: asked.append(name) or given[name][None]

    lazy = {name: later(name) if name in RAW else values for name, values in given.items()}
    time.sleep(1.1)  # HDF5 could keep times, in seconds
    second = commit(cell.path, DIGEST, 0, 1, SCHEMA, lazy, seconds=1.0)
    assert second.file.read_bytes() == first and asked == RAW
    assert len(list(cell.path.glob("*.h5"))) == 1


@pytest.mark.parametrize("sizes", [(70_000, 3, 20_000, 5, 1_500_000, 900), (1_200_000, 30_000, 20_000)], ids=len)
@pytest.mark.parametrize("last", ["float32", "bfloat16"])
def test_the_sha256_is_the_files_whatever_lies_where(cell, last, sizes):
    """It keeps pace with the writing where all between arrays is known; small ones may fill holes before large ones."""
    schema = {f"x/{i}": Column("float32", shape=(size,), raw=True) for i, size in enumerate(sizes)}
    schema = {"n": Column("int32"), **schema, "y": Column(last, shape=(sizes[-1],), raw=True), "z": Column("float64")}
    columns = {k: np.ones((1, *c.shape), np.float32 if c.raw else c.dtype) for k, c in schema.items()}
    marker = commit(cell.path, DIGEST, 0, 1, schema, columns, seconds=1.0)
    assert marker.sha256 == hashlib.sha256(marker.file.read_bytes()).hexdigest()
    one = Cell(0, "x", 1, DIGEST, cell.path)
    merge(one, schema, "{}")
    assert merged_is_current(one, schema)


@pytest.mark.parametrize("wrong", ["shape", "error"])
def test_an_array_that_does_not_come_as_it_should_leaves_nothing(cell, wrong):
    def late():
        if wrong == "error":
            raise UserError("the device is gone")
        return np.zeros((3, 5), np.float32)

    with pytest.raises((ValueError, UserError), match=r"has shape \(3, 5\)|the device is gone"):
        commit(cell.path, DIGEST, 0, 1, SCHEMA, {**block(0), RAW[2]: late}, seconds=1.0)
    assert list(cell.path.iterdir()) == []


def test_columns_that_do_not_fit_are_refused(cell):
    good = block(0)
    for name, values in (("sumsq", np.zeros((1, 8))), ("sumsq", np.zeros((2, 7))), (RAW[0], np.zeros((2, *WIDE)))):
        with pytest.raises(ValueError, match=f"column {name} has"):
            commit(cell.path, DIGEST, 0, 1, SCHEMA, {**good, name: values}, seconds=1.0)
    for bad in (
        {"dtype": "bfloat16"},
        {"dtype": "float64", "shape": (2,), "raw": True},
        {"dtype": "float32", "raw": True},
        {"dtype": "float32", "shape": (2,), "raw": True, "per": "n"},
    ):
        with pytest.raises(ValueError, match="raw"):
            Column(**bad)
    assert not cell.path.exists()


def test_merge_adds_blocks_in_the_order_of_rows_however_they_lie(cell, tmp_path):
    blocks = [block(row) for row in range(4)]
    want, backwards = {}, {}
    for name in RAW:
        parts = [b[name] if SCHEMA[name].dtype == "float32" else from_bfloat16(to_bfloat16(b[name])) for b in blocks]
        want[name] = ((parts[0] + parts[1]) + parts[2]) + parts[3]
        backwards[name] = ((parts[3] + parts[2]) + parts[1]) + parts[0]
        assert not np.array_equal(want[name], backwards[name])  # else this test could not fail
    files = []
    for number, cuts in enumerate([[(3,), (1,), (0,), (2,)], [(2, 3), (0, 1)], [(0, 1, 2), (1, 2, 3), (3,)]]):
        one = Cell(0, cell.name, 4, DIGEST, tmp_path / str(number))
        for rows in cuts:
            put(one, *rows)
        path = merge(one, SCHEMA, "{}")
        with h5py.File(path) as f:
            assert f.attrs["blocks"] == f.attrs["rows"] == 4 and f["samples"][:].tolist() == [1, 2, 3, 4]
            np.testing.assert_array_equal(f["sumsq"][:], np.concatenate([b["sumsq"] for b in blocks]))
            for name in RAW:
                assert f[name].dtype == np.float32 and "dtype" not in f[name].attrs
                np.testing.assert_array_equal(f[name][()].view(np.uint32), want[name].view(np.uint32))
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_what_rounding_took_from_a_cell_is_its_worst_block(cell):
    notes = []
    for marker in [put(cell, row) for row in range(4)]:
        with h5py.File(marker.file) as f:
            notes += [[f[name].attrs[f"rounding_{what}_relative"] for what in ("max", "l1")] for name in RAW[1:]]
    assert rounding_of(cell, SCHEMA) == tuple(np.max(notes, axis=0)) != tuple(np.min(notes, axis=0))
    assert rounding_of(cell, {"x": Column("float32")}) is None


def test_merge_says_which_shard_does_not_hold(cell):
    markers = [put(cell, row) for row in range(4)]
    os.truncate(markers[1].file, markers[1].file.stat().st_size - 1)
    flip(markers[3].file)
    assert [b.path.stem[:8] for b in scan(cell.path, DIGEST)[1]] == ["00000001"]
    reasons = [bad.reason for bad in scan(cell.path, DIGEST, deep=True)[1]]
    assert "bytes, the marker says" in reasons[0] and "another sha256" in reasons[1]
    with pytest.raises(UserError, match=r"rows 1-2, 3-4 of 4 are not done.*make resume"):
        merge(cell, SCHEMA, "{}")


@pytest.mark.parametrize("name", ["pwrite", "pwrite short"])
def test_a_byte_that_went_wrong_on_its_way_is_noticed(cell, monkeypatch, name):
    real = os.pwrite

    def bad(fd, data, offset):
        if name == "pwrite short" and len(data) > 1000:  # no error: the rest is to be written too
            return real(fd, data[: len(data) // 2], offset)
        if name == "pwrite" and len(data) > 1000:
            data = bytearray(data)
            data[500] ^= 1
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", bad)
    if name == "pwrite short":
        return test_a_raw_shard_holds_what_was_given_and_says_so(cell)
    with pytest.raises(UserError, match="Input/output error"):
        put(cell, 0)
    assert list(cell.path.iterdir()) == []


@pytest.mark.parametrize("lot", [1, 32], ids=["while more is written", "at the end"])
def test_a_disk_that_refuses_only_when_it_is_to_keep_what_it_took(cell, monkeypatch, lot):
    """As a quota of a network file system does."""

    def full(fd):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(raw, "SETTLED", lot)
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(UserError, match=r"Disk quota exceeded.*SUITE_SCRATCH"):
        put(cell, 0)
    assert list(cell.path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(raw, "SETTLED", lot)  # every piece a lot of its own, or all one
    test_a_raw_shard_holds_what_was_given_and_says_so(cell)


FULL = """
import sys, json; sys.path.insert(0, "tests")
from pathlib import Path
import lib.store.raw as raw
from test_store_large import *
from lib.base.errors import exit_with
here = Path("{folder}")
cell = Cell(0, "x", 4, DIGEST, here / "cell")
def main():
    put(cell, 0)
    (here / "ballast").write_bytes(bytes({ballast}))
    if {blind}:
        raw.check_room = lambda *_: None
    try:
        put(cell, 1)
    finally:
        done = [m.start for m in scan(cell.path, DIGEST, deep=True)[0]]
        print(json.dumps([done, sorted(p.name[:8] for p in cell.path.iterdir())]))
exit_with(main)
"""


@pytest.mark.parametrize("blind", [False, True], ids=["seen before", "met in the middle"])
def test_a_full_disk_is_said_leaves_no_marker_and_loses_nothing(tmp_path, blind):
    """A block takes 9.4 MB; room is left for 5 MB of the second."""
    code = FULL.format(folder=tmp_path, ballast=14_000_000 - 9_440_000, blind=blind)
    done = in_small_mount(tmp_path, "size=19m", code)
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr and "SUITE_SCRATCH" in done.stderr
    assert ("GB are free" in done.stderr) is not blind and len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout) == [[0], ["00000000", "00000000"]]


HANG = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_store_large import *
def wait():
    print("half", flush=True)
    time.sleep(60)
commit(Path(sys.argv[1]), DIGEST, 0, 1, SCHEMA, {**block(0), RAW[2]: wait}, seconds=1.0)
"""


def test_kill_9_leaves_a_temporary_file_for_sweep_and_no_marker(cell):
    job = subprocess.Popen([sys.executable, "-c", HANG, str(cell.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "half\n"
    (left,) = cell.path.iterdir()
    assert left.name.startswith(f".tmp-{HOST}-") and f"-{job.pid}-" in left.name
    sweep(cell.path)
    assert left.exists()  # its writer lives
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    assert scan(cell.path, DIGEST) == ([], [])
    sweep(cell.path)
    assert list(cell.path.iterdir()) == []


def test_two_writers_at_once_end_in_one_whole_file(cell):
    threads = [threading.Thread(target=put, args=(cell, 0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done, bad = scan(cell.path, DIGEST, deep=True)
    assert len(done) == 1 and not bad and len(list(cell.path.iterdir())) == 2


MEMORY = """
import resource, sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_store_large import *
SHAPE = (512, 1024)  # 2 MiB
schema = {{f"r/{{i}}": Column("{dtype}", shape=SHAPE, raw=True) for i in range(100)}}
def ask(i):
    return lambda: np.full(SHAPE, i, np.float32)
def write(cell, row, names):
    some = {{name: schema[name] for name in names}}
    columns = {{name: ask(row + i) for i, name in enumerate(names)}}
    commit(cell.path, DIGEST, row, row + 1, some, columns, seconds=1.0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
few, cell = (Cell(0, "x", rows, DIGEST, Path(sys.argv[1]) / str(rows)) for rows in (1, 2))
write(few, 0, list(schema)[:8])  # what libraries take once
merge(few, dict(list(schema.items())[:8]), "")
before = peak()
write(cell, 0, list(schema))
write(cell, 1, list(schema))
merge(cell, schema, "")
print(peak() - before, sum(f.stat().st_size for f in cell.path.glob("0*.h5")) >> 20)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_file(tmp_path, dtype):
    """Two blocks of 200 MiB of float32, and their sum, take no more than some arrays of 2 MiB and pieces of 4."""
    done = python("-c", MEMORY.format(dtype=dtype), str(tmp_path / "x"), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size >= (400 if dtype == "float32" else 200) and grown < 40


def test_chunks_of_arrays_are_small_and_those_of_values_as_ever():
    for rows, shape in [(128, (458_752,)), (16, (1_376_256,)), (128, (32, 14_336)), (5, (3,)), (1, (4096, 4096))]:
        column = Column("float32", shape=shape)
        chunk = chunk_of(column, rows)
        assert len(chunk) == 1 + len(shape) and all(c <= s for c, s in zip(chunk, (rows, *shape), strict=True))
        size = 4 * np.prod(chunk)
        assert size <= CHUNK_BYTES and size > min(CHUNK_BYTES, rows * column.value_bytes) / 2.5
    assert chunk_of(Column("float64"), 10) == (10,) and chunk_of(Column("uint8"), 10**7) == (CHUNK_ROWS,)


def test_rows_that_are_arrays_come_back_and_merge(cell):
    schema = {"tokens": Column("int32"), "signed": Column("float32", shape=(600_000,)), "x": Column("float64")}
    rng = np.random.default_rng(0)
    full = {"tokens": np.arange(4, dtype=np.int32), "signed": rng.random((4, 600_000), np.float32), "x": np.ones(4)}
    for a, b in ((0, 1), (1, 4)):
        commit(cell.path, DIGEST, a, b, schema, {k: v[a:b] for k, v in full.items()}, seconds=1.0)
    with h5py.File(merge(cell, schema, "{}")) as f:
        for name, values in full.items():
            np.testing.assert_array_equal(f[name][:], values)
        assert f["signed"].compression is None and f["signed"].fletcher32 and f["signed"].chunks[0] == 1
        assert f["x"].compression == "gzip" and f["x"].compression_opts == 4 and f["x"].shuffle


def test_the_plan_counts_the_arrays(cell):
    schema = {**SCHEMA, "t": Column("float32", per="samples")}
    wide = WIDE[0] * WIDE[1]
    assert stored_bytes(schema, 4, values=10) == 4 * (4 + 4 * wide + 7 * 8 + 2 * wide + 2 * 1500 + 10 * 4)
