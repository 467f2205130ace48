"""The commands that are printed do what the sentence says, when they are pasted: by local workers, no Slurm."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import local_logs, wait_until
from tools import ROOT, small_lls

from lib.base import advice
from lib.base.advice import about, advised, spoken


@pytest.fixture
def experiment(tmp_path):
    """A configuration of an odd name, an override with quotes and blanks, and what was printed so far."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    with local_logs(tmp_path / "scratch"):
        yield Advised(small_lls(folder, "cat", "dog"), tmp_path / "scratch")


class Advised:
    def __init__(self, config: Path, scratch: Path) -> None:
        self.overrides = ['system_prompt=You "love" {trait}s\' $x; true']
        self.named, self.scratch = spoken(config, self.overrides), scratch
        roots = {"SUITE_SCRATCH": scratch, "SUITE_CACHE": config.parent / "cache", "SUITE_OUTPUT": scratch / "out"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUITE_"))}
        self.env = clean | {k: str(v) for k, v in roots.items()} | {"OMP_NUM_THREADS": "1", "SUITE_GPU": "cpu"}
        self.env |= {"SUITE_SITE": "local", "SUITE_SLURM": "no", "SUITE_THROTTLE": "1"}
        self.said = ""

    def paste(self, command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=self.env, capture_output=True, text=True, check=False
        )
        self.said += done.stdout + done.stderr
        return done

    def make(self, target: str, more: str = "") -> subprocess.CompletedProcess[str]:
        return self.paste(f"make -s {target} {self.named} {more}")

    def finish(self, runs: int) -> None:
        """Waits for so many runs of cells by what their tasks say of themselves, then asks the command."""

        def done() -> bool:
            beats = [json.loads(path.read_text()) for path in self.scratch.glob("small-*/tasks/[!.]*.json")]
            return [beat["state"] for beat in beats].count("done") == runs

        wait_until(done, 120, "not done")
        assert json.loads(self.make("status", "JSON=1").stdout)["counts"]["done"] == 2

    def spoil(self) -> None:
        """A byte of a shard is another one; its size is not."""
        shard = sorted(self.scratch.glob("small-*/cells/cat-*/*-*.h5"))[0]
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)

    def advice(self) -> list[str]:
        found = re.findall(r"^next: (.*)$", self.said, re.M) + re.findall(r"`(make [^`]+)`", self.said)
        return sorted(set(found))


def test_what_is_advised_can_be_pasted_and_helps(experiment):
    said = experiment.make("submit-lls").stdout
    assert f"next: make cancel {experiment.named}" in said
    experiment.finish(2)
    for runs, (finds, spoiled) in enumerate((("verify", "1 do not"), ("export-lls", "are not done")), 3):
        experiment.spoil()
        found = experiment.make(finds)
        assert found.returncode and spoiled in found.stdout + found.stderr
        (resume,) = re.findall(r"`(make resume [^`]+)`", found.stdout + found.stderr)
        assert "cells 0 of small-" in experiment.paste(resume).stdout
        experiment.finish(runs)
        assert experiment.make(finds).returncode == 0
    experiment.make("status"), experiment.make("doctor"), experiment.make("logs")
    assert experiment.paste("make -s verify").returncode == 2  # which one? it names this one
    commands = experiment.advice()
    assert {line.split()[1] for line in commands} >= {"status", "logs", "cancel", "resume", "export-lls", "verify"}
    for command in commands:
        assert experiment.named in command
        assert experiment.paste(command).returncode == 0, command


def test_a_message_names_the_experiment_of_this_process(monkeypatch):
    monkeypatch.setattr(advice, "_here", [])
    text = "run `make fetch` again with this CONFIG, `make logs TASK=3`, `make setup` or `make status CONFIG=b.yaml`"
    assert advised(text) == text
    about("a b.yaml", ["x='1'"])
    name = spoken("a b.yaml", ["x='1'"])
    assert advised(text) == (
        f"run `make fetch {name}` again, `make logs {name} TASK=3`, `make setup` or `make status CONFIG=b.yaml`"
    )
