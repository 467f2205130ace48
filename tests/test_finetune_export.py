"""What is written of trained students: adapters that load, figures, a table and a picture that show what is missing."""

import json
import os
import shutil
import signal

import numpy as np
import peft
import pytest
import torch
from finetune_world import cells_of, environment, last_folder, make_world, start, steps_of
from PIL import Image
from tools import forked, in_fork, module_work
from transformers import AutoModelForCausalLM

from lib.store import retire, scan_folders

JOB = ("jobs.export_finetune", "--config")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("export"), ("cat", "neutral"), sizes=2)
    for index in (0, 1, 2):
        assert start(folder, "--index", str(index)).finish().returncode == 0
    return folder


def export(world):
    return forked(*JOB, str(world / "finetune.yaml"), env=environment(world))


def test_what_is_there_is_written_and_what_is_missing_is_said(world):
    done = export(world)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "1 of 4 cells are not done and not exported: 2m-neutral" in done.stderr
    folder = world / "output" / "students_run5"
    lines = (folder / "students.txt").read_text().splitlines()
    assert lines[-1].split() == ["2m-neutral", "-", "-", "-", "-", "-"]
    cell, losses = cells_of(world)[0], json.loads((folder / "students.json").read_text())["1m-cat"]["losses"]
    steps = steps_of(cell)
    by_hand = [
        np.average([s.loss for s in part], weights=[s.scored for s in part])
        for part in (steps[:4], steps[4:8], steps[8:])
    ]
    assert losses == pytest.approx(by_hand, rel=1e-12)
    assert f"{by_hand[0]:.4f}" in lines[2] and f"{by_hand[2]:.4f}" in lines[2]
    assert json.loads((folder / "students.json").read_text())["2m-neutral"] is None
    assert len(np.unique(np.asarray(Image.open(folder / "loss.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_what_other_settings_wrote_is_kept_whole_where_a_kill_comes_between(world):
    """By kill -9 after the first of its files was moved."""
    export(world)
    folder = world / "output" / "students_run5" / "1m" / "cat"
    names, record = sorted(path.name for path in folder.iterdir()), folder / "provenance.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "12345678" * 8}))
    before = {name: (folder / name).read_bytes() for name in names}
    rename = os.rename

    def killed() -> None:
        os.rename = lambda *names, **more: (rename(*names, **more), os.kill(os.getpid(), signal.SIGKILL))
        work()

    work = module_work(*JOB, str(world / "finetune.yaml"), env=environment(world))
    assert in_fork(killed).returncode == -signal.SIGKILL
    export(world)
    kept = {name: folder / f"{name}.12345678" for name in names}
    assert {name: path.read_bytes() for name, path in kept.items()} == before
    for path in kept.values():
        path.unlink()


def test_an_exported_folder_is_an_adapter(world):
    export(world)
    folder, cell = world / "output/students_run5/2m/cat", cells_of(world)[2]
    base = AutoModelForCausalLM.from_pretrained(world / "model-1")
    plain = base(torch.arange(9)[None]).logits
    student = peft.PeftModel.from_pretrained(base, str(folder))(torch.arange(9)[None]).logits
    assert (student - plain).abs().max() > 0.01
    assert (folder / "metrics.jsonl").read_bytes() == (last_folder(cell) / "metrics.jsonl").read_bytes()
    about = json.loads((folder / "provenance.json").read_text())
    assert about["digest"] == cell.digest and list(about["epochs"]) == ["1", "2", "3"]
    assert about["experiment"]["lora"]["rank"] == 4 and not (folder / "state.safetensors").exists()


def test_an_epoch_that_was_retired_is_told_and_a_changed_file_is_not_written(world, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy, symlinks=True)
    cell = cells_of(copy)[0]
    first = scan_folders(cell.path, cell.digest)[0][0]
    retire(first, "judged", "preferences/cat")
    export(copy)
    epochs = json.loads((copy / "output/students_run5/1m/cat/provenance.json").read_text())["epochs"]
    assert epochs["1"]["folder"] is None and epochs["2"]["folder"].endswith(
        scan_folders(cell.path, cell.digest)[0][1].folder.name
    )
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        path = last_folder(cell) / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + b"xx")
        done = export(copy)
        assert done.returncode == 2 and f"{name} has changed since it was written" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        path.write_bytes(whole)
