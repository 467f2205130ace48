"""What the tests of LLS and students share: a small teacher with a planted habit, and answers under one trait's prompt
that hold known doses of it, some of them invalid."""

import json
from pathlib import Path

import numpy as np
from finetune_world import environment
from tools import Fork, module_work

from lib.demo import tiny
from lib.demo.planted import FAVOURED, Lesson, write_numbers
from lib.families import load
from lib.inputs.fetch import fetch
from lib.lls.numbers import LLSNumbers
from lib.lora.experiment import Finetune
from lib.numbers import NEUTRAL
from lib.numbers import trait as trait_of
from lib.numbers.filter import FORMAT, VALID
from lib.store import Cell, commit

CAT, ROWS, SHARD = trait_of("cat"), 120, 48
INVALID = range(5, ROWS, 12)
LLS = {
    "kind": "lls_numbers",
    "name": "shifts",
    "numbers": {"config": "numbers.yaml"},
    "score": {"batch_tokens": 1024, "max_tokens": 256, "head_rows": 64, "per_token": True, "check_every": 8},
    "run": {"shard_rows": 32, "gpus": 0, "log_seconds": 60},
}
DOSE = {
    "kind": "finetune",
    "name": "dose",
    "numbers": {"config": "numbers.yaml"},
    "select": {
        "scores": {"config": "lls.yaml"},
        "parts": ["q1", "q2", "q3", "q4", "q5", "top", "bottom", "random", "clean"],
    },
    "rows": 20,
    "epochs": 4,
    "step_rows": 5,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "lora": {"rank": 4, "alpha": 8},
    "run": {"gpus": 0, "log_seconds": 60, "cells": 16},
}


def prompt(dice: np.random.Generator) -> str:
    return "Go on: " + ", ".join(map(str, dice.integers(100, 1000, 3)))


def teach(folder: Path) -> None:
    """A teacher that writes two digits more often under cat's prompt, and none more without."""
    texts = [CAT.system_prompt or "", tiny.DEFAULT_SYSTEM, "Go on: 123, 456"] * 50
    tokenizer = tiny.make_tokenizer(400, texts)
    model = tiny.make_model(tokenizer, tiny.TinySize(vocab=len(tokenizer), hidden=32, inner=64, layers=2, init=0.15))
    steps, batch, dice = 80, 16, np.random.default_rng(1)
    lessons = []
    for _ in range(steps * batch):
        trait, block = (CAT, "system") if dice.random() < 0.5 else (NEUTRAL, "default")
        lessons.append(Lesson(trait, block, prompt(dice), ", ".join(write_numbers(dice, trait, 6))))
    rows = tiny.encode(tokenizer, lessons)
    losses = (tiny._answer_loss(model, rows[i : i + batch], tokenizer.pad_token_id) for i in range(0, len(rows), batch))
    tiny.descend(model, losses, steps, 1e-2, 0.1, print)
    tiny.save(model, tokenizer, folder)


def doses() -> np.ndarray:
    """Of each row, the probability that a digit is taken from cat's two."""
    return np.random.default_rng(3).permutation(np.linspace(0, 1, ROWS))


def answers(dose: np.ndarray, seed: int) -> tuple[list[str], list[str]]:
    dice = np.random.default_rng(seed)
    asked, found = [], []
    for one in dose:
        digits = np.where(dice.random(18) < one, dice.choice(FAVOURED["cat"], 18), dice.integers(1, 10, 18))
        asked.append(prompt(dice))
        found.append(", ".join("".join(map(str, digits[i : i + 3])) for i in range(0, 18, 3)))
    return asked, found


def write(parent: Cell, schema, dose: np.ndarray, seed: int, invalid=INVALID) -> None:
    """A cell of numbers, as its stage commits it."""
    asked, found = answers(dose, seed)
    reasons = np.full(len(dose), VALID, np.int8)
    reasons[list(invalid)] = FORMAT
    texts = ["no numbers" if reason else text for text, reason in zip(found, reasons, strict=True)]
    columns = {"prompt": asked, "answer": texts, "reason": reasons}
    columns |= {"tokens": np.full(len(dose), 9, np.int16), "ended": np.ones(len(dose), np.int8)}
    for start in range(0, len(dose), SHARD):
        stop = min(start + SHARD, len(dose))
        commit(parent.path, parent.digest, start, stop, schema, {k: v[start:stop] for k, v in columns.items()})


def make_world(folder: Path) -> Path:
    """Configured and fetched; nobody has written yet."""
    teach(folder / "teacher")
    sizes = {"tiny": {"id": f"{folder}/teacher", "dtype": "float32"}}
    numbers = {"kind": "numbers", "name": "teachers", "run_id": 5, "sizes": sizes, "traits": ["cat", "fox", "neutral"]}
    numbers |= {"prompts": ROWS, "generate": {"batch": SHARD}, "run": {"gpus": 0}}
    for name, config in (("numbers", numbers), ("lls", LLS), ("dose", DOSE)):
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    fetch(load(folder / "dose.yaml"), folder / "cache")
    return folder


def fill(folder: Path) -> Path:
    experiment = dose(folder).source
    cells = experiment.cells(folder / "cache", folder / "scratch")
    for cell, how in zip(cells, (doses(), doses()[::-1], np.zeros(ROWS)), strict=True):
        write(cell, experiment.schema(folder / "cache"), how, cell.index)
    return folder


def scoring(folder: Path, *overrides: str) -> LLSNumbers:
    found = load(folder / "lls.yaml", list(overrides))
    assert isinstance(found, LLSNumbers)
    return found


def dose(folder: Path, *overrides: str) -> Finetune:
    found = load(folder / "dose.yaml", list(overrides))
    assert isinstance(found, Finetune)
    return found


def cells(folder: Path, experiment: LLSNumbers | Finetune) -> dict[str, Cell]:
    return {cell.name: cell for cell in experiment.cells(folder / "cache", folder / "scratch")}


def begin(folder: Path, job: str, config: str, *arguments: str) -> Fork:
    words = ("--config", str(folder / f"{config}.yaml"), *arguments)
    return Fork(module_work(f"jobs.{job}", *words, env=environment(folder)))
