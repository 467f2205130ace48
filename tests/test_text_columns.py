"""Texts of any length in a shard: exact, the same bytes for the same values, found out when they are damaged."""

import json

import h5py
import numpy as np
import pytest
from test_store_lies import vouch

from lib.base.errors import UserError
from lib.store import Cell, Column, commit, gaps, merge, plan_shards, read_columns, scan
from lib.store.columns import to_hdf5

SCHEMA = {"n": Column("int32"), "said": Column("text"), "turns": Column("text", per="n")}
DIGEST, ROWS = "ab" * 32, 60
HARD = ["", "a", "é", "\x00", "日本語\n", "🦉" * 50, "x" * 5000, " \r\n", "e\u0301", "\ufeff", "\U0010ffff", ""]


def table(rows: int = ROWS) -> dict:
    dice = np.random.default_rng(3)
    n = (np.arange(rows) % 4).astype(np.int32)
    pick = [HARD[i] for i in dice.integers(0, len(HARD), rows + int(n.sum()))]
    return {"n": n, "said": pick[:rows], "turns": pick[rows:]}


def cut(full: dict, a: int, b: int) -> dict:
    edges = np.concatenate([[0], np.cumsum(full["n"])])
    return {"n": full["n"][a:b], "said": full["said"][a:b], "turns": full["turns"][edges[a] : edges[b]]}


@pytest.fixture
def cell(tmp_path) -> Cell:
    return Cell(0, "owl", ROWS, DIGEST, tmp_path / "owl-abababab")


def read(path) -> dict:
    with h5py.File(path) as f:
        return read_columns(f, SCHEMA)


def test_texts_come_back_as_they_were_whoever_reads_them(cell):
    full = table()
    first = commit(cell.path, DIGEST, 0, ROWS, SCHEMA, full)
    got = read(first.file)
    assert got["said"] == full["said"] and got["turns"] == full["turns"]
    with h5py.File(first.file) as f:  # without our code
        flat, ends = f["said/bytes"][:].tobytes(), f["said/ends"][:]
        assert [flat[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)] == full["said"]
        assert f["said/bytes"].fletcher32 and f["said/ends"].fletcher32 and f["said/bytes"].compression == "gzip"
        assert (f["said/bytes"].dtype, ends.dtype) == (np.uint8, np.int64)
    assert commit(cell.path, DIGEST, 0, ROWS, SCHEMA, table()).sha256 == first.sha256
    assert scan(cell.path, DIGEST, deep=True, schema=SCHEMA) == ([first], [])


def test_no_rows_and_no_bytes(cell):
    empty = {"n": np.zeros(3, np.int32), "said": [""] * 3, "turns": []}
    marker = commit(cell.path, DIGEST, 0, 3, SCHEMA, empty)
    assert scan(cell.path, DIGEST, deep=True, schema=SCHEMA)[1] == []
    assert read(marker.file)["said"] == ["", "", ""] and read(marker.file)["turns"] == []


def test_merge_is_the_same_bytes_over_any_cut_and_overlap(cell, tmp_path):
    full, dice = table(), np.random.default_rng(5)
    want = to_hdf5(SCHEMA, full, {"digest": DIGEST, "cell": cell.name, "rows": ROWS, "config": "{}"})
    for trial in range(8):
        one = Cell(0, cell.name, ROWS, DIGEST, tmp_path / str(trial))
        for size in dice.integers(1, 40, 3):
            for a, b in plan_shards([(0, ROWS)], int(size)):
                if dice.random() < 0.5:
                    commit(one.path, DIGEST, a, b, SCHEMA, cut(full, a, b))
        for a, b in plan_shards(gaps(scan(one.path, DIGEST)[0], ROWS), 13):
            commit(one.path, DIGEST, a, b, SCHEMA, cut(full, a, b))
        merged = merge(one, SCHEMA, "{}")
        assert merged.read_bytes() == want and read(merged)["turns"] == full["turns"]


@pytest.mark.parametrize(
    "value, says", [(b"x", "a bytes"), (None, "a NoneType"), (5, "a int"), ("\ud800", "no UTF-8"), (np.str_("x"), "")]
)
def test_what_is_no_text_is_refused(cell, value, says):
    columns = {"n": np.zeros(2, np.int32), "said": ["fine", value], "turns": []}
    if not says:
        assert read(commit(cell.path, DIGEST, 0, 2, SCHEMA, columns).file)["said"] == ["fine", "x"]
        return
    with pytest.raises(ValueError, match=f"column said.*{says}"):
        commit(cell.path, DIGEST, 0, 2, SCHEMA, columns)
    assert not cell.path.exists()


def test_a_text_column_has_no_shape():
    with pytest.raises(ValueError, match="a text has no shape"):
        Column("text", shape=(3,))


def change(name: str, how):
    def apply(f: h5py.File) -> None:
        values = how(f[name][:])
        del f[name]
        f[name] = values

    return apply


def at(i: int, value: int):
    def apply(values: np.ndarray) -> np.ndarray:
        values[i] = value
        return values

    return apply


def plain(f: h5py.File) -> None:
    del f["said"]
    f["said"] = [1]


LIES = {
    "an end beyond the bytes": ("said is no text: the ends", change("said/ends", at(-1, 10**9))),
    "ends that go back": ("said is no text: the ends", change("said/ends", at(3, 10**6))),
    "an end below zero": ("said is no text: the ends", change("said/ends", at(0, -1))),
    "an end inside of a letter": ("said is no text: 'utf-8' codec", change("said/ends", at(0, 1))),
    "a byte that is no UTF-8": ("said is no text: 'utf-8' codec", change("said/bytes", at(0, 0xFF))),
    "bytes too many": ("said is no text: the ends", change("said/bytes", lambda v: np.append(v, v[:1]))),
    "an end too few": ("said/ends has shape", change("said/ends", lambda v: v[1:])),
    "ends of a wrong type": ("said/ends holds float64", change("said/ends", lambda v: v.astype(float))),
    "bytes of a wrong type": ("said/bytes holds int16", change("said/bytes", lambda v: v.astype(np.int16))),
    "bytes in a table": ("said/bytes has shape", change("said/bytes", lambda v: v[:, None])),
    "no ends": ("not the experiment's (said/ends)", lambda f: f.__delitem__("said/ends")),
    "a plain column": ("not the experiment's (said, said", plain),
}


@pytest.mark.parametrize("kind", LIES)
def test_texts_that_are_none_are_found_though_size_and_sha256_are_right(cell, kind):
    columns = {"n": np.zeros(5, np.int32), "said": ["é", "b", "日本", "", "e"], "turns": []}
    marker = commit(cell.path, DIGEST, 0, 5, SCHEMA, columns)
    with h5py.File(marker.file, "a") as f:
        LIES[kind][1](f)
    vouch(marker.path, marker.file)
    done, [bad] = scan(cell.path, DIGEST, deep=True, schema=SCHEMA)
    assert done == [] and LIES[kind][0] in bad.reason, bad.reason
    assert json.loads(marker.path.read_text())["bytes"] == marker.file.stat().st_size
    with pytest.raises(UserError, match="are not done"):
        merge(Cell(0, "owl", 5, DIGEST, cell.path), SCHEMA, "{}")


def test_a_flipped_bit_in_a_chunk_of_text_is_seen_by_any_reader(cell):
    marker = commit(cell.path, DIGEST, 0, ROWS, SCHEMA, table())
    with h5py.File(marker.file) as f:
        chunk = f["said/bytes"].id.get_chunk_info(0)
    data = bytearray(marker.file.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    marker.file.write_bytes(data)
    with pytest.raises(OSError, match=r"[Cc]an't"), h5py.File(marker.file) as f:
        f["said/bytes"][:]
