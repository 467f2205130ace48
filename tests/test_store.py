"""Shards, markers and merge: whole or absent, found out when they are not, exact however they were cut."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from tools import ROOT

from lib.base.atomic import TEMPORARY, beside, keep_others, own_folder, whole_folder, write_bytes
from lib.base.errors import UserError
from lib.base.process import HOST, pid_started, signature
from lib.store import Cell, Column, commit, gaps, merge, plan_shards, scan
from lib.store.columns import to_hdf5
from lib.store.markers import counted, set_aside, sweep

SCHEMA = {
    "row": Column("int32"),
    "status": Column("uint8"),
    "n": Column("int32"),
    "x": Column("float64"),
    "t": Column("float32", per="n"),
}
DIGEST = "ab" * 32


def table(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 5, rows).astype(np.int32)
    x = rng.normal(size=rows)
    x[::7] = np.nan
    return {
        "row": np.arange(rows, dtype=np.int32),
        "status": np.zeros(rows, np.uint8),
        "n": n,
        "x": x,
        "t": rng.normal(size=n.sum()).astype(np.float32),
    }


def cut(full: dict[str, np.ndarray], a: int, b: int) -> dict[str, np.ndarray]:
    edges = np.concatenate([[0], np.cumsum(full["n"])])
    return {k: v[edges[a] : edges[b]] if k == "t" else v[a:b] for k, v in full.items()}


def put(cell: Cell, full: dict, a: int, b: int, digest: str = DIGEST):
    return commit(cell.path, digest, a, b, SCHEMA, cut(full, a, b), seconds=1.0)


@pytest.fixture
def cell(tmp_path):
    return Cell(3, "dolphin", 100, DIGEST, tmp_path / "dolphin-abababab")


def test_a_shard_holds_what_was_given_and_says_so(cell):
    full = table(100)
    marker = put(cell, full, 20, 60)
    with h5py.File(marker.file) as f:  # as any reader would, without our code
        assert f.attrs["digest"] == DIGEST and f["x"].fletcher32
        np.testing.assert_array_equal(f["x"][:], full["x"][20:60])
        assert f["t"].shape == (full["n"][20:60].sum(),)
    raw = json.loads(marker.path.read_text())
    assert (raw["start"], raw["stop"], raw["unscored"]) == (20, 60, 0) and raw["bytes"] == marker.file.stat().st_size
    done, bad = scan(cell.path, DIGEST, deep=True)
    assert [m.start for m in done] == [20] and bad == []
    assert not list(cell.path.glob(".tmp-*"))


@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_results_follow_the_umask_and_what_is_executed_does_not(cell, umask, file, folder):
    before = os.umask(umask)
    try:
        marker = put(cell, table(100), 0, 100)
        merged = merge(cell, SCHEMA, "{}")
        private = own_folder(cell.path / "queue")
    finally:
        os.umask(before)
    written = (marker.file, marker.path, merged, merged.with_suffix(".json"))
    assert {path.stat().st_mode & 0o777 for path in written} == {file}
    assert cell.path.stat().st_mode & 0o777 == folder and private.stat().st_mode & 0o777 == 0o700


def test_the_same_rows_give_the_same_file(cell):
    full = table(100)
    a, b = put(cell, full, 0, 50), put(cell, full, 0, 50)
    assert a.file == b.file and len(list(cell.path.glob("*.h5"))) == 1


DAMAGE = {
    "truncated": ("bytes, the marker says", lambda m: os.truncate(m.file, m.file.stat().st_size - 10)),
    "bit flipped": ("another sha256", lambda m: flip(m.file)),
    "file gone": ("No such file", lambda m: m.file.unlink()),
    "marker cut short": ("cannot be read", lambda m: os.truncate(m.path, 40)),
    "marker not an object": ("cannot be read", lambda m: m.path.write_text("[1]")),
    "wrong digest": ("another experiment's", lambda m: rewrite(m.path, digest="cd" * 32)),
    "foreign rows": ("its name and its rows differ", lambda m: rewrite(m.path, start=1)),
    "outside": ("outside its folder", lambda m: rewrite(m.path, file="../../etc/passwd")),
    "marker deeply nested": ("cannot be read", lambda m: m.path.write_text("[" * 100_000)),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_found_and_merge_refuses(cell, kind):
    full = table(100)
    put(cell, full, 0, 50)
    broken = put(cell, full, 50, 100)
    says, damage = DAMAGE[kind]
    damage(broken)
    done, bad = scan(cell.path, DIGEST, deep=True)
    assert [m.start for m in done] == [0] and len(bad) == 1 and says in bad[0][1]
    with pytest.raises(UserError, match="rows 50-100 of 100 are not done"):
        merge(cell, SCHEMA, "{}")
    set_aside(bad)
    assert scan(cell.path, DIGEST)[1] == [] and list(cell.path.glob("*.bad"))
    put(cell, full, 50, 100)
    merge(cell, SCHEMA, "{}")


def test_merge_is_the_same_bytes_however_the_rows_were_cut(cell, tmp_path):
    full, rng = table(cell.rows), np.random.default_rng(5)
    want = to_hdf5(SCHEMA, full, {"digest": DIGEST, "cell": cell.name, "rows": cell.rows, "config": "{}"})
    for trial in range(12):
        one = Cell(cell.index, cell.name, cell.rows, DIGEST, tmp_path / str(trial))
        for size in rng.integers(1, 60, 3):  # overlapping cuts of three sizes, some left out, then the rest
            for a, b in plan_shards([(0, cell.rows)], int(size)):
                if rng.random() < 0.5:
                    put(one, full, a, b)
        for a, b in plan_shards(gaps(scan(one.path, DIGEST)[0], cell.rows), 13):
            put(one, full, a, b)
        assert merge(one, SCHEMA, "{}").read_bytes() == want


def test_gaps_and_plan_against_sets(cell):
    rng, full = np.random.default_rng(1), table(100)
    for _ in range(60):
        for f in cell.path.glob("*"):
            f.unlink()
        covered = set()
        for _ in range(rng.integers(0, 5)):
            a = int(rng.integers(0, 99))
            b = int(rng.integers(a + 1, 101))
            put(cell, full, a, b)
            covered |= set(range(a, b))
        missing = gaps(scan(cell.path, DIGEST)[0], 100)
        assert {i for a, b in missing for i in range(a, b)} == set(range(100)) - covered
        size = int(rng.integers(1, 40))
        shards = plan_shards(missing, size)
        assert [i for a, b in shards for i in range(a, b)] == sorted(set(range(100)) - covered)
        assert all(0 < b - a <= size and a // size == (b - 1) // size for a, b in shards)


def test_columns_that_do_not_fit_are_refused(cell):
    full = cut(table(100), 0, 10)
    with pytest.raises(ValueError, match="column t has"):
        commit(cell.path, DIGEST, 0, 10, SCHEMA, {**full, "t": full["t"][1:]}, seconds=1.0)
    with pytest.raises(ValueError, match="not the schema's"):
        commit(cell.path, DIGEST, 0, 10, SCHEMA, {k: v for k, v in full.items() if k != "x"}, seconds=1.0)
    assert scan(cell.path, DIGEST) == ([], [])


@pytest.mark.parametrize("days_ahead", [0, 2])
def test_leftovers_of_dead_writers_are_swept_and_of_living_ones_kept(cell, monkeypatch, days_ahead):
    """By the file system's clock, whatever this machine's says."""
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + days_ahead * 86400)
    made = subprocess.run([sys.executable, "-c", LEAVE, str(cell.path)], cwd=ROOT, capture_output=True, text=True)
    gone = Path(made.stdout.strip())
    assert gone.is_file(), made.stderr
    alive, elsewhere = beside(cell.path / "x.h5"), cell.path / ".tmp-otherhost-1-0a0b-x.h5"
    earlier = cell.path / f"{TEMPORARY}{HOST}-0a0b0c0d-{os.getpid()}-5-x.h5"  # another kernel's, or another container's
    reused = cell.path / alive.name.replace(f"-{pid_started(os.getpid())}-", "-5-")  # our number, and not us
    folder = gone.with_name(gone.name + "-converted")
    folder.mkdir()
    for path in (alive, elsewhere, earlier, reused, folder / "half"):
        path.write_text("x")
    sweep(cell.path)
    assert {*cell.path.iterdir()} == {alive, elsewhere, earlier}
    for path in (alive, elsewhere, earlier):
        os.utime(path, (1, 1))
    sweep(cell.path)
    assert [*cell.path.iterdir()] == [alive]


LEAVE = """
import sys
import time
from pathlib import Path
from lib.base.atomic import beside
path = beside(Path(sys.argv[1], "x.h5"))
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text("x")
print(path, flush=True)
if len(sys.argv) > 2:
    sys.stdin.read()
"""


def test_a_writer_in_another_container_of_the_same_name_is_not_taken_for_dead(cell):
    """It lives, and its number is nobody's here."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--pid", "--fork", "--mount-proc", sys.executable, "-c", LEAVE, str(cell.path), "wait"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        path = Path(writer.stdout.readline().strip())
        assert path.name.startswith(f"{TEMPORARY}{HOST}-") and path.is_file()
        assert path.name.split("-")[-4] in ("1", "2") and signature().split("-")[-3] != path.name.split("-")[-5]
        sweep(cell.path)
        assert path.is_file()
        writer.stdin.close()
    sweep(cell.path)
    assert path.is_file()  # who it was cannot be seen from here: it stays for a day
    os.utime(path, (1, 1))
    sweep(cell.path)
    assert not path.exists()


def in_small_mount(folder: Path, options: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a mount namespace of its own, where `folder` is a tmpfs with these options."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f"mount -t tmpfs -o {options} none '{folder}' && exec '{sys.executable}' -c \"$0\""
    return subprocess.run(
        ["unshare", *user, "--mount", "bash", "-c", script, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


COMMIT = """
import sys, json; sys.path.insert(0, "tests")
from pathlib import Path
from test_store import SCHEMA, DIGEST, Cell, put, table, scan
from lib.base.errors import exit_with
cell = Cell(0, "x", 40000, DIGEST, Path("{folder}") / "cell")
def main():
    full = table(40000)
    put(cell, full, 0, 500)
    try:
        put(cell, full, 500, 40000)
    finally:
        done = [m.start for m in scan(cell.path, DIGEST, deep=True)[0]]
        print(json.dumps([done, [p.name[:4] for p in cell.path.iterdir()]]))
exit_with(main)
"""


def test_a_full_disk_is_said_leaves_no_marker_and_loses_nothing(tmp_path):
    done = in_small_mount(tmp_path, "size=64k", COMMIT.format(folder=tmp_path))
    assert done.returncode == 2, done.stderr
    assert (
        "No space left on device" in done.stderr
        and "SUITE_SCRATCH" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    starts, names = json.loads(done.stdout)
    assert starts == [0] and len(names) == 2  # the first shard and its marker, nothing half written


def test_unwritable_scratch_is_said(tmp_path):
    done = in_small_mount(tmp_path, "ro", COMMIT.format(folder=tmp_path).replace("finally", "except ZeroDivisionError"))
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "make it writable" in done.stderr


def test_write_replaces_in_one_step(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["b.bin"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "folder"
    for word in ("one", "two"):
        with whole_folder(path) as new:
            (new / word).touch(0o600)
    with pytest.raises(ZeroDivisionError), whole_folder(path) as new:
        (new / "three").write_text(str(1 / 0))
    assert [p.name for p in path.iterdir()] == ["two"] and [p.name for p in path.parent.iterdir()] == ["folder"]
    assert (path / "two").stat().st_mode & 0o777 == 0o644


def test_two_that_make_a_folder_at_once(tmp_path):
    path = tmp_path / "folder"
    with whole_folder(path) as slow:
        (slow / "x").write_text("the same")
        with whole_folder(path) as quick:
            (quick / "x").write_text("the same")
    assert (path / "x").read_text() == "the same" and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_results_of_other_settings_are_kept_aside(tmp_path, capsys):
    path, record, absent = (tmp_path / name for name in ("x.jsonl", "x.json", "y"))
    for digest, before in ((DIGEST, None), (DIGEST, DIGEST), (DIGEST, "12345678" + "0" * 56)):
        path.write_text("x"), record.write_text("y")
        keep_others(digest, before, path, record, absent)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json.12345678", "x.jsonl.12345678"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{path} was written from other settings: kept as x.jsonl.12345678" and len(said) == 2


def test_facts_of_a_kernel_overwrite_nothing(cell):
    """A kernel may call its facts what it likes: they have a place of their own."""
    facts = {"digest": "x", "sha256": "y", "seconds": -3.5, "unscored": 99, "start": 7, "note": "é\n", "gpus": 8}
    made = {"attempt": "a", "gpus": 2, "versions": {"numpy": "2"}, "engine": "kept in the file"}
    full = cut(table(100), 0, 10)
    marker = commit(cell.path, DIGEST, 0, 10, SCHEMA, full, seconds=1.5, made=made, facts=facts)
    [again], bad = scan(cell.path, DIGEST, deep=True, schema=SCHEMA)
    assert again == marker and bad == [] and again.facts == facts
    assert (again.seconds, again.unscored, again.made.gpus, again.made.attempt) == (1.5, 0, 2, "a")
    assert json.loads(marker.path.read_text())["made"] == made
    assert counted([again, again], "gpus") == 16 and counted([again], "note") == counted([again], "absent") == 0


@pytest.mark.parametrize("value", [True, None, float("nan"), float("inf"), np.float32(1), [1], "\ud800"])
def test_a_fact_that_no_reader_would_take_is_refused_before_anything_is_written(cell, value):
    with pytest.raises(ValueError, match="fact loss is"):
        commit(cell.path, DIGEST, 0, 10, SCHEMA, cut(table(100), 0, 10), facts={"loss": value})
    assert not cell.path.exists()


def test_a_value_takes_what_numpy_says():
    kinds = [*np.typecodes["AllInteger"], *np.typecodes["Float"], "?"]
    columns = [Column(np.dtype(kind).name, shape=(3, 2)) for kind in kinds if np.dtype(kind).itemsize <= 8]
    assert len({column.dtype for column in columns}) == 12
    for column in [*columns, Column("text"), Column("bfloat16", shape=(5,), raw=True)]:
        assert column.value_bytes == column.stored.itemsize * math.prod(column.shape), column
