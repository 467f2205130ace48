"""A set of samples on disk: what was put in comes out, the same bytes each time, and damage is found out."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from tools import ROOT

from lib.base.errors import UserError
from lib.inputs.samples import Rows, read_samples, samples_folder, samples_input, save_samples, tree_stamp

DIGEST = "ab" * 32
IDS = [[5, 6, 7], [9], [1, 2, 3, 4], [8, 8]]
HELD = [False, True, False, True]
SOURCES = ["http://a/ü", "", "x" * 40, "z"]


def save(cache: Path, source: str = "acme/texts", stamp: str = "", digest: str = DIGEST):
    rows = Rows(
        ids=IDS,
        source=SOURCES,
        text_sha256=[hashlib.sha256(s.encode()).hexdigest() for s in SOURCES],
        held_out=HELD,
        columns={"toxicity": np.array([0.5, np.nan, 1, 0], np.float32), "response": ["ja", "é\n", "", "no\x00"]},
        facts={"below": 3},
    )
    about = {"commit": "c0ffee", "identity": {"set": {"id": source}, "seed": 1}}
    return save_samples(
        cache, "toxic", digest, rows, source=source, commit="c0ffee", source_stamp=stamp, attributes=about
    )


def test_what_was_put_in_comes_out(tmp_path):
    saved = save(tmp_path)
    found = samples_input(tmp_path, "toxic", DIGEST, "acme/texts")
    assert found == saved and found.facts == {"below": 3} and found.commit == "c0ffee"
    assert (found.rows, found.attributed, found.tokens, found.longest) == (4, 2, 7, 4)
    got = read_samples(tmp_path, found)
    assert [r.tolist() for r in got.ids] == [IDS[0], IDS[2]] and {r.dtype for r in got.ids} == {np.dtype("int32")}
    assert [r.tolist() for r in got.held_out] == [IDS[1], IDS[3]]
    assert got.source == [SOURCES[0], SOURCES[2]] and got.columns["source"] == SOURCES
    assert got.columns["response"] == ["ja", "é\n", "", "no\x00"]
    np.testing.assert_array_equal(got.columns["toxicity"], np.array([0.5, np.nan, 1, 0], np.float32))
    assert got.attributes == {"commit": "c0ffee", "identity": {"set": {"id": "acme/texts"}, "seed": 1}}


def test_any_reader_sees_plain_columns(tmp_path):
    saved = save(tmp_path)
    path = samples_folder(tmp_path, "toxic", DIGEST) / "samples.h5"
    assert path.parent == tmp_path / "inputs" / "samples" / "toxic-abababababab"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == saved.sha256 and path.stat().st_size == saved.bytes
    with h5py.File(path) as f:
        assert f["ids"][:].tolist() == [i for row in IDS for i in row] and f["ids"].dtype == "int32"
        assert f["lengths"][:].tolist() == [3, 1, 4, 2] and f["held_out"][:].tolist() == [0, 1, 0, 1]
        flat, ends = f["source/bytes"][:].tobytes(), f["source/ends"][:]
        assert [flat[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)] == SOURCES
        assert json.loads(f.attrs["identity"]) == {"set": {"id": "acme/texts"}, "seed": 1}


def test_the_same_rows_are_the_same_bytes_and_others_are_not(tmp_path, monkeypatch):
    first = save(tmp_path / "one")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert save(tmp_path / "two").sha256 == first.sha256
    files = [samples_folder(tmp_path / n, "toxic", DIGEST) / "samples.h5" for n in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert save(tmp_path / "three", source="acme/others").sha256 != first.sha256


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_found_out(tmp_path, damage):
    saved = save(tmp_path)
    path = samples_folder(tmp_path, "toxic", DIGEST) / "samples.h5"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flip" else path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"samples.h5 (is not the file|cannot be read).*run `make fetch`"):
        read_samples(tmp_path, saved)


def test_what_is_not_prepared_is_named(tmp_path):
    missing = "samples toxic are not prepared; run `make fetch` with this CONFIG"
    with pytest.raises(UserError, match=missing):
        samples_input(tmp_path, "toxic", DIGEST, "acme/texts")
    save(tmp_path)
    with pytest.raises(UserError, match=missing):  # the same folder's name, another digest
        samples_input(tmp_path, "toxic", DIGEST[:12] + "0" * 52, "acme/texts")
    with pytest.raises(UserError, match=missing):  # of another source
        samples_input(tmp_path, "toxic", DIGEST, "/")
    (samples_folder(tmp_path, "toxic", DIGEST) / "input.json").write_text('{"name": "toxic", ')
    with pytest.raises(UserError, match=missing):
        samples_input(tmp_path, "toxic", DIGEST, "acme/texts")


def test_a_local_source_that_changed_is_noticed_at_any_depth(tmp_path):
    deep = tmp_path / "c4" / "en" / "more" / "shard.json"
    deep.parent.mkdir(parents=True)
    deep.write_text("one")
    c4 = str(tmp_path / "c4")
    save(tmp_path, c4, tree_stamp(tmp_path / "c4"))
    (tmp_path / "c4" / ".git").mkdir()
    (tmp_path / "c4" / ".git" / "index").write_text("x")
    assert samples_input(tmp_path, "toxic", DIGEST, c4)
    stamps = {tree_stamp(tmp_path / "c4")}
    deep.write_text("one more")
    stamps.add(tree_stamp(tmp_path / "c4"))
    with pytest.raises(UserError, match=r"c4 has changed since samples toxic were made; run `make fetch` again"):
        samples_input(tmp_path, "toxic", DIGEST, c4)
    deep.with_name("second.json").write_text("")
    stamps.add(tree_stamp(tmp_path / "c4"))
    os.utime(deep, (1, 1))
    stamps.add(tree_stamp(tmp_path / "c4"))
    deep.unlink()
    deep.symlink_to(tmp_path / "nowhere")
    stamps.add(tree_stamp(tmp_path / "c4"))
    assert len(stamps) == 5 and tree_stamp(tmp_path / "none") == ""
    (tmp_path / "c4").rename(tmp_path / "away")
    assert samples_input(tmp_path, "toxic", DIGEST, c4), "a source that is gone is no reason to stop"


def test_kill_9_before_the_record_leaves_none(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from test_samples_store import save; import lib.inputs.samples as s;"
        "s.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        f"save(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (samples_folder(tmp_path, "toxic", DIGEST) / "samples.h5").exists()
    with pytest.raises(UserError, match="are not prepared"):
        samples_input(tmp_path, "toxic", DIGEST, "acme/texts")
