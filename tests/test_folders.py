"""Folder pieces, pieces whose first marker wins, and pieces that were retired: whole or absent, and one for ever."""

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_store import in_small_mount, rewrite
from tools import ROOT

from lib.base.errors import UserError
from lib.store import Cell, Column, commit, commit_folder, gaps, merge, read_columns, retire, scan, scan_folders
from lib.store.markers import Bad, drop_retired, set_aside, sweep

DIGEST = "ab" * 32


def fill(folder: Path, word: str = "one") -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(np.arange(50_000).tobytes())
    (folder / "deep" / "er" / "é.json").write_text(json.dumps({"word": word}))


def put(cell: Path, word: str = "one", name: str = "adapter", **more):
    return commit_folder(cell, DIGEST, name, lambda tmp: fill(tmp, word), **more)


def why_not(cell: Path, deep: bool = True) -> str:
    done, bad = scan_folders(cell, DIGEST, deep)
    assert not done and len(bad) == 1
    return bad[0].reason


def test_a_folder_holds_what_was_given_and_says_so(tmp_path):
    piece = put(tmp_path, seconds=2.0, made={"attempt": "a"}, facts={"loss": -0.5, "best": "adam"})
    said = json.loads((tmp_path / "adapter.json").read_text())
    for one in said["files"]:  # as any reader would, without our code
        data = (tmp_path / said["folder"] / one["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one["bytes"], one["sha256"])
    assert [one["path"] for one in said["files"]] == ["deep/er/é.json", "weights.bin"]
    assert re.fullmatch(r"adapter-[0-9a-f]{10}", said["folder"]) and said["facts"] == {"loss": -0.5, "best": "adam"}
    for deep in (False, True):
        assert scan_folders(tmp_path, DIGEST, deep) == ([piece], [])
    again = put(tmp_path)
    assert again.folder == piece.folder and len(list(tmp_path.iterdir())) == 2
    assert scan(tmp_path, DIGEST) == ([], []), "no shard"


def link(folder: Path, target: str) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(target)


def link_folder(folder: Path) -> None:
    (folder / "deep").rename(folder.parent / "elsewhere")
    (folder / "deep").symlink_to(folder.parent / "elsewhere")


def lie(changes):
    return lambda p: rewrite(p.path, **changes(json.loads(p.path.read_text())))


def renamed(said: dict, path: str) -> dict:
    """A manifest that is right about itself and names a file elsewhere."""
    files = [{**said["files"][0], "path": path}, said["files"][1]]
    sha = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {"files": files, "sha256": sha, "folder": f"adapter-{sha[:10]}"}


DAMAGE = {
    "cut off": ("bytes, the marker says", lambda p: os.truncate(p.folder / "weights.bin", 100)),
    "changed": ("another sha256", lambda p: (p.folder / "deep/er/é.json").write_text('{"word": "two"}')),
    "gone": ("lacks: weights.bin", lambda p: (p.folder / "weights.bin").unlink()),
    "one too many": ("one file too many: deep/x", lambda p: (p.folder / "deep/x").write_text("")),
    "a hidden one too many": ("one file too many: .x", lambda p: (p.folder / ".x").write_text("")),
    "a link": ("neither a file nor a folder", lambda p: link(p.folder, "/etc/passwd")),
    "a link to a folder": ("neither a file nor a folder", lambda p: link_folder(p.folder)),
    "a pipe": ("neither a file nor a folder", lambda p: os.mkfifo(p.folder / "pipe")),
    "no folder": ("No such file", lambda p: p.folder.rename(p.folder.with_name("x"))),
    "marker cut short": ("cannot be read", lambda p: os.truncate(p.path, 90)),
    "another digest": ("another experiment's", lambda p: rewrite(p.path, digest="cd" * 32)),
    "another's folder": ("another piece's folder", lambda p: rewrite(p.path, folder="../other-0123456789")),
    "another's name": ("another piece's folder", lambda p: rewrite(p.path, name="other")),
    "no manifest": ("cannot be read", lambda p: rewrite(p.path, files=[{"path": "x"}])),
    "a shorter manifest": ("its manifest is another", lie(lambda said: {"files": said["files"][1:]})),
    "a manifest that leaves": ("one outside its folder", lie(lambda said: renamed(said, "../x"))),
    "a manifest from the root": ("one outside its folder", lie(lambda said: renamed(said, "/etc/passwd"))),
    "a file twice": ("names a file twice", lie(lambda said: renamed(said, "weights.bin"))),
    "other sizes": ("its manifest is another", lambda p: rewrite(p.path, bytes=5)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_found_and_made_again(tmp_path, kind):
    cell = tmp_path / "cell"
    piece = put(cell)
    DAMAGE[kind][1](piece)
    assert DAMAGE[kind][0] in why_not(cell)
    assert kind == "changed" or DAMAGE[kind][0] in why_not(cell, deep=False)
    set_aside(scan_folders(cell, DIGEST, deep=True)[1])
    assert scan_folders(cell, DIGEST) == ([], []) and list(cell.glob("*.bad"))
    assert put(cell).sha256 == piece.sha256 and scan_folders(cell, DIGEST, deep=True)[1] == []
    assert [p.name for p in cell.glob(".tmp-*")] == []


@pytest.mark.parametrize("name", ["../x", "merged", "X", "", "a/b", "a.b", "00000000-00000010"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a folder piece"):
        put(tmp_path / "cell", name=name)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        commit_folder(tmp_path / "cell", DIGEST, "x", lambda tmp: (tmp / "out").symlink_to("/etc"))
    assert list((tmp_path / "cell").iterdir()) == []


WRITE = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_folders import put
from lib.base.errors import exit_with
{prelude}
exit_with(lambda: put(Path("{folder}") / "cell", {how}) and 0)
"""


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_full_disk_is_said_and_leaves_nothing_half_there(tmp_path):
    prelude = f"import atexit, os; atexit.register(lambda: print(os.listdir('{tmp_path}/cell')))"
    done = in_small_mount(tmp_path, "size=200k", WRITE.format(folder=tmp_path, how="", prelude=prelude))
    assert done.returncode == 2 and done.stdout.strip() == "[]", done.stdout + done.stderr
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_kill_9_at_random_points_leaves_a_whole_folder_or_none(tmp_path):
    """One writer commits the same folder with new words for ever; after each kill, what is vouched for is whole."""
    prelude = f"for i in range(10**6): put(Path('{tmp_path}') / 'cell', str(i), name=f'p{{i % 3}}')"
    dice, cell, seen = random.Random(3), tmp_path / "cell", 0
    for _ in range(10):
        writer = python(WRITE.format(folder=tmp_path, how="", prelude=prelude))
        before = {p: p.stat().st_mtime_ns for p in cell.glob("p*.json")} if cell.exists() else {}
        end = time.monotonic() + 60
        while {p: p.stat().st_mtime_ns for p in cell.glob("p*.json")} == before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.1))
        writer.kill()
        writer.communicate()
        done, bad = scan_folders(cell, DIGEST, deep=True)
        assert bad == [] and done
        seen += 1
    sweep(cell)
    assert seen == 10 and not list(cell.glob(".tmp-*"))


def test_two_copies_at_once(tmp_path):
    same = [python(WRITE.format(folder=tmp_path, how="", prelude="")) for _ in range(4)]
    assert [p.wait(60) for p in same] == [0] * 4, [p.communicate() for p in same]
    assert len(scan_folders(tmp_path / "cell", DIGEST, deep=True)[0]) == 1
    assert len(list((tmp_path / "cell").iterdir())) == 2
    other = [python(WRITE.format(folder=tmp_path, how=f"'{i}'", prelude="")) for i in range(4)]
    assert [p.wait(60) for p in other] == [0] * 4
    [piece], bad = scan_folders(tmp_path / "cell", DIGEST, deep=True)
    assert bad == [] and json.loads((piece.folder / "deep/er/é.json").read_text())["word"] in "0123"


# ---- the first marker wins

TEXTS = {"x": Column("float64")}
RACE = """
import sys, time; sys.path.insert(0, "tests")
import test_folders
from pathlib import Path
while not Path("{folder}/go").exists(): time.sleep(0.001)
for i in range(12):
    test_folders.sample(Path("{folder}/cell"), i)
"""


def sample(cell: Path, i: int) -> None:
    """A shard and a folder of what nobody else draws; each attempt keeps a note of what it was given."""
    shard = commit(cell, DIGEST, i, i + 1, TEXTS, {"x": np.frombuffer(os.urandom(8))}, sampled=True)
    piece = put(cell, os.urandom(8).hex(), name=f"text-{i}", sampled=True)
    (cell.parent / f"given-{os.getpid()}-{i}").write_text(f"{shard.sha256} {piece.sha256}")


def test_all_who_sample_at_once_see_one_text_for_ever(tmp_path):
    racers = [python(RACE.format(folder=tmp_path)) for _ in range(6)]
    time.sleep(1)
    (tmp_path / "go").touch()
    said = "".join(racer.communicate(timeout=120)[0] for racer in racers)
    assert [racer.returncode for racer in racers] == [0] * 6
    assert "another copy was first with other bits; its are kept, these are dropped" in said
    cell = tmp_path / "cell"

    def seen() -> list[str]:
        shards, worse = scan(cell, DIGEST, deep=True, schema=TEXTS)
        folders, bad = scan_folders(cell, DIGEST, deep=True)
        assert (len(shards), len(folders), worse, bad) == (12, 12, [], [])
        named = {f.name: f.sha256 for f in folders}
        return [f"{shard.sha256} {named[f'text-{shard.start}']}" for shard in shards]

    first = seen()
    for i in range(12):
        assert {p.read_text() for p in tmp_path.glob(f"given-*-{i}")} == {first[i]}
    assert len(list(tmp_path.glob("given-*"))) == 72
    assert len(list(cell.iterdir())) == 48, "what lost is removed"
    for i in range(12):  # a resume that did not see them
        sample(cell, i)
    assert seen() == first


def test_a_first_marker_that_does_not_hold_is_set_aside(tmp_path, capsys):
    first = put(tmp_path, "first", sampled=True)
    assert put(tmp_path, "second", sampled=True).sha256 == first.sha256
    assert "adapter: another copy was first" in capsys.readouterr().out
    (first.folder / "weights.bin").write_bytes(b"rot")
    second = put(tmp_path, "second", sampled=True)
    assert second.sha256 != first.sha256 and not second.adopted
    assert scan_folders(tmp_path, DIGEST, deep=True) == ([second], []) and (tmp_path / "adapter.json.bad").exists()


def test_what_was_judged_is_set_aside_and_not_what_took_its_place(tmp_path):
    piece = put(tmp_path, sampled=True)
    judged = Bad(piece.path, "it was cut off", (1, 2, 3))
    set_aside([judged])
    assert scan_folders(tmp_path, DIGEST, deep=True) == ([piece], [])


@pytest.mark.parametrize("renames", [True, False])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, renames):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    if not renames:
        monkeypatch.setattr("lib.store.markers.NEW_ONLY", 1 << 20)  # the kernel: such a flag there is not
        with pytest.raises(UserError, match="neither hard links nor exclusive renames; point SUITE_SCRATCH"):
            put(tmp_path, sampled=True)
        return
    first = put(tmp_path, "first", sampled=True)
    assert put(tmp_path, "second", sampled=True).sha256 == first.sha256
    assert scan_folders(tmp_path, DIGEST, deep=True) == ([first], [])


# ---- retired


def test_a_retired_piece_counts_as_done_and_says_why(tmp_path):
    cell = Cell(0, "owl", 10, DIGEST, tmp_path / "cell")
    values = {"x": np.arange(10.0)}
    shard = commit(cell.path, DIGEST, 0, 6, TEXTS, {"x": values["x"][:6]}, facts={"n": 3})
    commit(cell.path, DIGEST, 6, 10, TEXTS, {"x": values["x"][6:]})
    folder = put(cell.path)
    retire(shard, "exported", "student_cat")
    retire(folder, "a later epoch holds", "epoch-10")
    assert not shard.file.exists() and not folder.folder.exists()
    for deep in (False, True):
        done, bad = scan(cell.path, DIGEST, deep, TEXTS if deep else None)
        assert gaps(done, 10) == [] and bad == [] and done[0].facts == {"n": 3}
        assert (done[0].retired.why, done[0].retired.read_by) == ("exported", "student_cat")
        assert scan_folders(cell.path, DIGEST, deep)[0][0].retired.read_by == "epoch-10"
    with pytest.raises(UserError, match=r"h5 was retired \(exported; read by student_cat\): to have it again, delete"):
        merge(cell, TEXTS, "{}")
    shard.path.unlink()  # what the sentence says
    assert gaps(scan(cell.path, DIGEST)[0], 10) == [(0, 6)]
    commit(cell.path, DIGEST, 0, 6, TEXTS, {"x": values["x"][:6]})
    import h5py

    with h5py.File(merge(cell, TEXTS, "{}")) as f:
        np.testing.assert_array_equal(read_columns(f, TEXTS)["x"], values["x"])


def test_retiring_is_marked_before_it_is_done(tmp_path, monkeypatch):
    piece = put(tmp_path)
    monkeypatch.setattr("lib.store.markers.remove", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if not pid:
        retire(piece, "why", "who")
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    [found], bad = scan_folders(tmp_path, DIGEST, deep=True)
    assert bad == [] and found.retired and found.folder.exists()
    drop_retired([found])
    assert not found.folder.exists() and scan_folders(tmp_path, DIGEST, deep=True) == ([found], [])


FULL = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from contextlib import suppress
from test_folders import *
from lib.base.errors import exit_with
here = Path("{folder}")
def main():
    piece = put(here / "cell")
    if {wide}:  # a marker that would need another block
        said = json.loads(piece.path.read_text())
        piece.path.write_text(json.dumps(said | {{"note": "x" * (4090 - len(json.dumps(said | {{"note": ""}})))}}))
    with (here / "ballast").open("wb", buffering=0) as f, suppress(OSError):
        while f.write(bytes(4096)):
            pass
    before = piece.path.read_bytes()
    try:
        retire(piece, "asked", "owl")
    except UserError:
        assert piece.path.read_bytes() == before and piece.folder.exists()
        raise
    [found], bad = scan_folders(here / "cell", DIGEST, deep=True)
    assert bad == [] and found.retired.read_by == "owl" and not found.folder.exists()
    assert sorted(path.name for path in (here / "cell").iterdir()) == [piece.path.name]
exit_with(main)
"""


@pytest.mark.parametrize("wide", [False, True], ids=["in its block", "not in its block"])
def test_a_full_disk_is_freed(tmp_path, wide):
    """Retiring is what makes room; where a marker has none for the word, it stays as it is, and a sentence says so."""
    done = in_small_mount(tmp_path, "size=1m", FULL.format(folder=tmp_path, wide=wide))
    assert done.returncode == 2 * wide, done.stderr
    assert ("No space left on device" in done.stderr) is wide and len(done.stderr.splitlines()) == wide


def test_a_piece_that_another_has_replaced_is_not_retired(tmp_path):
    first, second = put(tmp_path, "first"), put(tmp_path, "second")
    assert not retire(first, "why", "who")
    assert scan_folders(tmp_path, DIGEST, deep=True) == ([second], [])


def test_a_second_copy_does_not_bring_back_what_was_retired(tmp_path):
    piece = put(tmp_path, sampled=True)
    retire(piece, "a later state holds", "step-00000020")
    for word in ("one", "other bits"):
        assert put(tmp_path, word, sampled=True).retired
        assert [p.name for p in tmp_path.iterdir()] == ["adapter.json"]
