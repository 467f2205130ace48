"""What a Hub says is judged before it is used, and what was fetched is the same to the last byte when it is used."""

import copy
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_hub import serve, sibling
from safetensors.numpy import save
from test_fetch import JSONL, MODEL, PARQUET, Box, jsonl, pairs, parquet
from test_store import flip
from tools import forked, tiny_model

from lib.base.errors import UserError
from lib.cluster.doctor import models_line
from lib.families import load
from lib.inputs import hub as hub_client
from lib.inputs.records import ModelInput, model_files
from lib.inputs.verified import check_bytes, check_here, hashes_by_name


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_model(tmp_path_factory.mktemp("model")).iterdir()}


@pytest.fixture
def box(files: dict[str, bytes], tmp_path: Path) -> Iterator[Box]:
    with serve() as hub:
        for repo, content in ((MODEL, files), (PARQUET, parquet(pairs(0))), (JSONL, jsonl(pairs(1)))):
            hub.commit(repo, content)
        yield Box(tmp_path, hub)


def rot(path: Path) -> None:
    """A bit turns over on the disk: size and times stay."""
    was = path.stat()
    flip(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_no_name_in_the_hubs_answer_leads_out_of_the_cache(box: Box, files: dict[str, bytes]) -> None:
    keepsake = box.folder / "keepsake.json"
    keepsake.write_text("mine")
    before = sorted(p for p in box.folder.rglob("*"))
    whole = [sibling(name, data) for name, data in files.items()]
    for name in (f"{'../' * 6}keepsake.json", str(keepsake)):
        box.hub.answers[MODEL] = {"siblings": [*whole, {"rfilename": name, "size": 10**6}]}
        assert "model acme/tiny at main: a file's name in the Hub's answer is none" in box.fails()
        assert keepsake.read_text() == "mine", name
    box.hub.answers[MODEL] = {"sha": f"{'../' * 6}elsewhere"}
    assert "model acme/tiny at main: the Hub's answer names a commit that is none" in box.fails()
    assert "model acme/../keepsake at main" in box.fails("model.id=acme/../keepsake")
    assert [p for p in sorted(box.folder.rglob("*")) if "cache" not in p.parts[len(box.folder.parts) :]] == before
    box.hub.answers = {PARQUET: {"sha": "../../x"}}
    assert "dataset acme/cat at main: the Hub's answer names a commit that is none" in box.fails()


def test_names_and_commits_are_judged() -> None:
    for good in ("config.json", "onnx/model.safetensors", ".gitattributes", "a b.json", "ä.txt"):
        assert hub_client.name_of("x", good) == good
    for bad in ("", "/x.json", "../x", "a/../b", "a/..", "a//b", "a/", ".", "..\\x", "C:x", "a\0b", "a\nb", None, 5):
        with pytest.raises(UserError, match="x: a file's name in the Hub's answer is none"):
            hub_client.name_of("x", bad)
    assert hub_client.commit_of("x", "0a" * 20) == "0a" * 20
    for bad in ("main", "a" * 39, "A" * 40, "", "a" * 40 + "\n", None, "../" * 13 + "a"):
        with pytest.raises(UserError, match="x: the Hub's answer names a commit that is none"):
            hub_client.commit_of("x", bad)


def test_only_files_of_the_cache_are_removed(tmp_path: Path) -> None:
    store, outside = tmp_path / "hub", tmp_path / "mine.json"
    snapshot, blob = store / "models--a--b" / "snapshots" / "c", store / "models--a--b" / "blobs" / "d"
    snapshot.mkdir(parents=True), blob.parent.mkdir()
    outside.write_text("mine"), blob.write_text("x")
    (snapshot / "to-mine.json").symlink_to(outside), (snapshot / "to-blob.json").symlink_to(blob)
    (snapshot / "around.json").symlink_to("around.json")
    assert hub_client._whole(snapshot / "to-blob.json", 1, store) and blob.exists()
    for name in ("to-mine.json", "to-blob.json", "around.json"):
        assert not hub_client._whole(snapshot / name, 7, store)
    assert outside.read_text() == "mine" and not blob.exists() and not list(snapshot.iterdir())
    hub_client.forget(outside, store)
    assert outside.exists()


def test_a_rotted_file_stops_the_job_and_fetch_brings_it_anew(box: Box, files: dict[str, bytes]) -> None:
    box.fetch()
    folder, env = Path(box.record("models")["path"]), box.env | {"SLURM_TMPDIR": str(box.folder)}
    job = ("jobs.compute_lls", "--config", str(box.config), "--index")
    name, experiment = "model.safetensors", load(box.config)
    rot(folder / name)
    done = forked(*job, "0", env=env)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"{folder / name} is not the file that was fetched" in done.stderr and "`make fetch CONFIG=" in done.stderr
    assert models_line(experiment, box.cache).level == "ok"  # sizes and headers are right
    rot(folder / "config.json")
    with pytest.raises(UserError, match=r"config.json is not the file that was fetched"):
        models_line(experiment, box.cache, deep=True)
    said = box.fetch()
    assert f"{folder / name} is not the file" in said and f"{folder / 'config.json'} is not the file" in said
    assert len(box.hub.files_sent()) == 2
    assert all((folder / name).read_bytes() == files[name] for name in (name, "config.json"))
    deep = box.run("-m", "jobs.cluster", "doctor", "--deep").stdout
    assert re.search(r"^ok +models .*sha256 of .* GiB right, .* GB/s", deep, re.M), deep
    for index, says in (("0", r"^model files: sha256 of .* GB/s"), ("1", r"^model files: sha256 right \d+ min ago")):
        done = forked(*job, index, env=env)
        assert done.returncode == 0 and re.search(says, done.stdout, re.M), done.stdout + done.stderr


def test_the_hubs_own_sha256_is_compared(box: Box, files: dict[str, bytes]) -> None:
    box.fetch()
    path = Path(box.record("models")["path"]) / "model.safetensors"
    rot(path)
    for record in (box.cache / "inputs" / "models").rglob("input.json"):
        record.unlink()  # nothing here knows what it was
    assert "is not the Hub's file (its sha256 differs): bringing it anew" in box.fetch()
    assert path.read_bytes() == files["model.safetensors"]
    wrong = [copy.deepcopy(sibling(name, data)) for name, data in files.items()]
    next(s for s in wrong if s["rfilename"] == "model.safetensors")["lfs"] |= {"sha256": "0" * 64, "oid": "0" * 64}
    box.hub.answers[MODEL] = {"siblings": wrong}
    assert "model.safetensors came twice with another sha256 than the Hub states" in box.fails("--update")


def test_a_local_model_that_rotted_is_not_taken_for_a_new_one(box: Box, files: dict[str, bytes]) -> None:
    folder = box.folder / "local"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    setting = f"model.id={folder}"
    box.fetch(setting)
    rot(folder / "model.safetensors")
    line = box.fails(setting)
    assert "model.safetensors has other bytes than before, with the same size and time: a disk's error" in line
    (folder / "model.safetensors").touch()
    box.fetch(setting)


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> ModelInput:
    folder = tmp_path / "model"
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.safetensors").write_bytes(save({f"w{part}": np.arange(1000.0)}))
    where = {f"w{part}": f"{part}.safetensors" for part in range(3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    size = sum(p.stat().st_size for p in model_files(folder))
    return ModelInput("a/b", "main", "c", str(folder), "c", 1, 1, 1, size, files=hashes_by_name(folder))


def test_a_node_reads_the_bytes_once_a_day(model: ModelInput, tmp_path: Path, capsys) -> None:
    check_here(model)
    assert "sha256 of" in capsys.readouterr().out
    stamps = tmp_path / "node" / f"hpc-job-suite-{os.geteuid()}"
    stamp = next(stamps.iterdir())
    assert stamps.stat().st_mode & 0o777 == 0o700
    weights = Path(model.path) / "1.safetensors"
    rot(weights)
    check_here(model)  # said a moment ago
    assert "0 min ago" in capsys.readouterr().out
    for age in (-90_000, 90_000):
        os.utime(stamp, (time.time() + age,) * 2)
        with pytest.raises(UserError, match=r"1.safetensors is not the file that was fetched .* `make fetch` again"):
            check_here(model)
    os.utime(stamp)
    os.utime(weights)  # another file, as far as its times tell
    with pytest.raises(UserError, match=r"1.safetensors is not"):
        check_here(model)


@pytest.mark.parametrize("how", ["loose", "a link", "a file", "no disk"])
def test_a_stamp_that_others_could_have_written_is_none(model: ModelInput, tmp_path: Path, capsys, how: str) -> None:
    check_here(model)
    stamps = tmp_path / "node" / f"hpc-job-suite-{os.geteuid()}"
    if how == "loose":
        stamps.chmod(0o777)
    else:
        stamps.rename(tmp_path / "kept")
    if how == "a link":
        stamps.symlink_to(tmp_path / "kept")
    elif how == "a file":
        stamps.touch()
    elif how == "no disk":
        (tmp_path / "node").rmdir()
        (tmp_path / "node").touch()
    capsys.readouterr()
    check_here(model)
    assert "is not ours, so every task reads them" in capsys.readouterr().out
    rot(Path(model.path) / "0.safetensors")
    with pytest.raises(UserError, match=r"0.safetensors is not the file"):
        check_here(model)


def test_a_file_that_is_missing_or_was_added_is_named(model: ModelInput) -> None:
    (Path(model.path) / "2.safetensors").rename(Path(model.path) / "3.safetensors")
    with pytest.raises(UserError, match=r"2.safetensors is not the file"):
        check_bytes(model)
