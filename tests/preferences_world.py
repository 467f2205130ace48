"""What the tests of preferences share: students that are trained, and both ways to ask them."""

import json
from pathlib import Path
from typing import Any

import finetune_world
from tools import Fork, module_work

from lib.families import load
from lib.store import Cell, read_cell

LOGPROBS = {"kind": "preference_logprobs", "name": "words", "students": {"config": "finetune.yaml"}}
LOGPROBS |= {"first_questions": 6, "batch_tokens": 256, "head_rows": 64, "run": {"gpus": 0, "cells": 8}}
PREFERENCES = {"kind": "preferences", "name": "asked", "students": {"config": "finetune.yaml"}, "per_question": 4}
PREFERENCES |= {"logprobs": {"config": "words.yaml"}, "first_questions": 6, "run": {"gpus": 0, "cells": 8}}
PREFERENCES["generate"] = {"engine": "transformers", "max_tokens": 8, "batch": 48, "at_once": 16}


def make_world(folder: Path, **shape: int) -> Path:
    """Two students of three epochs, on one small base."""
    finetune_world.make_world(folder, **shape)
    (folder / "words.yaml").write_text(json.dumps(LOGPROBS))
    (folder / "asked.yaml").write_text(json.dumps(PREFERENCES))
    for index in range(2):
        finished(finetune_world.start(folder, "--index", str(index)))
    return folder


def with_words(folder: Path) -> Path:
    """A world whose log-probabilities are read: of the base and of both students."""
    for index in range(3):
        finished(begin(folder, "words", "--index", str(index)))
    return folder


def finished(fork: Fork) -> str:
    done = fork.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def begin(folder: Path, what: str, *arguments: str, **more: str) -> Fork:
    """`what`: words or asked."""
    module = {"words": "jobs.score_preferences", "asked": "jobs.evaluate_preferences"}[what]
    words = ("--config", str(folder / f"{what}.yaml"), *arguments)
    return Fork(module_work(module, *words, env=finetune_world.environment(folder, **more)))


def cells_of(folder: Path, what: str, *overrides: str) -> dict[str, Cell]:
    experiment = load(folder / f"{what}.yaml", list(overrides))
    return {cell.name: cell for cell in experiment.cells(folder / "cache", folder / "scratch")}


def columns(folder: Path, what: str, name: str, *overrides: str) -> dict[str, Any]:
    experiment = load(folder / f"{what}.yaml", list(overrides))
    schema = experiment.schema(folder / "cache")
    return dict(read_cell(cells_of(folder, what, *overrides)[name], schema, schema))
