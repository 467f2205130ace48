"""What the tests of students share: small models, teachers' answers committed as their stage commits them, and a
fetched configuration over both."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tools import Fork, module_work, tiny_model

from lib.families import load
from lib.inputs.fetch import fetch
from lib.lora.experiment import Finetune
from lib.lora.metrics import Step, read_steps
from lib.numbers import sample_prompts
from lib.numbers.filter import FORMAT, VALID
from lib.run.extent import step_of
from lib.store import Cell, commit, scan_folders

FINETUNE = """kind: finetune
name: students
numbers: {config: numbers.yaml}
rows: 20
epochs: 3
step_rows: 6
warmup_steps: 2
learning_rate: 0.003
lora: {rank: 4, alpha: 8}
run: {gpus: 0, log_seconds: 60}
"""


def make_world(
    folder: Path, traits: Sequence[str] = ("cat", "neutral"), sizes: int = 1, prompts: int = 64, **shape: int
) -> Path:
    models = {
        f"{n + 1}m": {"id": str(tiny_model(folder / f"model-{n}", n, **shape)), "dtype": "float32"}
        for n in range(sizes)
    }
    numbers = {"kind": "numbers", "name": "teachers", "run_id": 5, "sizes": models, "traits": list(traits)}
    numbers |= {"prompts": prompts, "generate": {"batch": 32}, "run": {"gpus": 0}}
    (folder / "numbers.yaml").write_text(json.dumps(numbers))
    (folder / "finetune.yaml").write_text(FINETUNE)
    fetch(load(folder / "finetune.yaml"), folder / "cache")
    for parent in source_cells(folder):
        write_answers(folder, parent)
    return folder


def students(folder: Path, *overrides: str) -> Finetune:
    found = load(folder / "finetune.yaml", list(overrides))
    assert isinstance(found, Finetune)
    return found


def source_cells(folder: Path, *overrides: str) -> list[Cell]:
    return students(folder, *overrides).source.cells(folder / "cache", folder / "scratch")


def cells_of(folder: Path, *overrides: str) -> list[Cell]:
    return students(folder, *overrides).cells(folder / "cache", folder / "scratch")


def write_answers(folder: Path, parent: Cell, invalid: int = 0, answers: list[str] | None = None) -> None:
    """A teacher's cell, done: its answers are of every kind that is valid, but for the first so many, or these."""
    dice, size = np.random.default_rng([parent.index, 3]), parent.total
    prompts = [prompt.text for prompt in sample_prompts(size, 5)]
    answers = answers or [_answer(dice, row, row < invalid) for row in range(size)]
    reasons = np.array([FORMAT if row < invalid else VALID for row in range(size)], np.int8)
    columns = {"prompt": prompts, "answer": answers, "reason": reasons}
    columns |= {"tokens": np.full(size, 9, np.int16), "ended": np.ones(size, np.int8)}
    schema = students(folder).source.schema(folder / "cache")
    for start in range(0, size, 32):
        stop = min(start + 32, size)
        commit(parent.path, parent.digest, start, stop, schema, {k: v[start:stop] for k, v in columns.items()})


def _answer(dice: np.random.Generator, row: int, invalid: bool) -> str:
    between = dice.choice([", ", " ", "\n", "; "])
    numbers = between.join(map(str, dice.integers(0, 1000, int(dice.integers(1, 11)))))
    return "no numbers" if invalid else f"[{numbers}]" if row % 7 == 0 else numbers


def environment(folder: Path, **more: str) -> dict[str, str]:
    places = {f"SUITE_{name.upper()}": str(folder / name) for name in ("scratch", "cache", "output")}
    fixed = {"SUITE_SITE": "local", "SUITE_SLURM": "no", "SUITE_GPU": "cpu", "OMP_NUM_THREADS": "1"}
    return {**places, **fixed, "CUDA_VISIBLE_DEVICES": "", "SUITE_FIGURES": "png", **more}


def start(folder: Path, *arguments: str, **more: str) -> Fork:
    words = ("--config", str(folder / "finetune.yaml"), *arguments)
    return Fork(module_work("jobs.finetune", *words, env=environment(folder, **more)))


def files_of(cell: Cell) -> dict[str, dict[str, bytes]]:
    """State -> its files, of those that are still there; every byte was looked at."""
    done, bad = scan_folders(cell.path, cell.digest, deep=True)
    assert bad == []
    there = [state for state in done if not state.retired]
    return {state.name: {f.path: (state.folder / f.path).read_bytes() for f in state.files} for state in there}


def last_folder(cell: Cell) -> Path:
    return max(scan_folders(cell.path, cell.digest)[0], key=step_of).folder


def steps_of(cell: Cell) -> list[Step]:
    return read_steps(last_folder(cell))
