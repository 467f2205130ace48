"""A queue that cannot be asked, or answers nonsense: nothing is taken for known."""

import os
from dataclasses import replace

import pytest
from tools import small_lls

from lib.base.errors import UserError
from lib.cluster import command as front
from lib.cluster import pipeline, slurm
from lib.cluster.live import OTHER, live_tasks
from lib.cluster.send import Request
from lib.cluster.status import status
from lib.families import load
from lib.run.experiment import Stage
from lib.run.heartbeat import Heartbeat
from lib.run.task import freeze


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return small_lls(tmp_path_factory.mktemp("inputs"), "cat", "dog", "owl")


def test_a_squeue_that_hangs_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="squeue gave no answer in 1 s"):
        slurm.ask("squeue", timeout=1)


@pytest.mark.parametrize(
    "text", ["7_0|RUNNING", "7_0||1|||", "7_0|DONE|x||1.2.3K|0:0", "\x00|||||", "7_0.batch|R|1||1.2.3K|0"]
)
def test_nonsense_of_sacct_is_passed_over(text):
    good = "7_1|COMPLETED|5|gres/gpu=1||0:0"
    assert set(slurm.parse_sacct(f"{text}\n{good}\n")) == {"7_1"}


@pytest.fixture
def unanswered(inputs, tmp_path, monkeypatch):
    """The experiment in this process, its first cell at work by its own word, and a queue that cannot be asked."""
    experiment = load(inputs)
    cells = experiment.cells(inputs.parent / "cache", tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7"), monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    Heartbeat(tmp_path / "small" / "tasks", cells[0], 1).beat("running")
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    monkeypatch.setattr(slurm, "ask", lambda *command, timeout=0: (_ for _ in ()).throw(UserError(f"{command[0]}: no")))
    monkeypatch.setattr(Request, "cells", cells)
    here = front.site()
    return Request(experiment, inputs, [], here.__class__(**{**vars(here), "scratch": tmp_path}))


def test_a_task_that_nobody_can_be_asked_about_is_unknown(unanswered):
    now = status("small", unanswered.cells)
    assert (now.counts["unknown"], now.counts["stale"], now.queue_note) == (1, 0, "squeue: no")
    table = front.show.table(now, unanswered.spoken, ("submit-lls", "export-lls"))
    assert "unknown" in table and "stale" not in table and "resume" not in table


def test_a_pipeline_asks_once_for_all_its_stages_and_watching_it_goes_on(unanswered, monkeypatch):
    asked, slept = [], []

    def ask(*command: str, timeout: float = 0) -> str:
        asked.append(command[0])
        raise UserError("squeue: no")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    class Whole:
        def stages(self) -> list[Stage]:
            return [Stage(unanswered.config, (), unanswered.experiment)] * 3

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(pipeline.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        pipeline.show_status(unanswered, Whole(), as_json=False, watch=True)
    assert len(slept) == 2 and asked == ["squeue"] * 2


def test_watching_goes_on_while_the_queue_cannot_be_asked(unanswered, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(front.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        front._status(unanswered, as_json=False, watch=True, brief=True)
    assert len(slept) == 2


def test_what_waits_for_other_settings_is_said(inputs, tmp_path, monkeypatch):
    """A configuration was edited after its cells were submitted."""
    old = load(inputs).cells(inputs.parent / "cache", tmp_path)
    new = [replace(cell, digest="0" * 64) if cell.index == 1 else cell for cell in old]
    name = freeze(tmp_path / "small", [[cell] for cell in old])
    queue = [slurm.Queued("7", cell.index, "PENDING", "Priority", "", "small", tasks=name) for cell in old]
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    live = live_tasks(new, lambda: queue)
    assert [live[cell.name].reason for cell in new] == ["Priority", OTHER, "Priority"]
    now = status("small", new, ask=lambda: queue)
    assert [cell.state for cell in now.cells] == ["pending"] * 3 and now.cells[1].note == OTHER
