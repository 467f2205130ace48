"""Preferences that are planted: answers and log-probabilities committed as their stages commit them, of students that
nobody trained, and the same figures again from the answers by plain loops."""

import json
from pathlib import Path

import numpy as np
from finetune_world import make_world as students_world

from lib.families import load
from lib.preferences.experiment import Logprobs, Preferences
from lib.store import Cell, commit

STUDENTS = {"kind": "finetune", "name": "students", "numbers": {"config": "numbers.yaml"}, "rows": 20, "epochs": 3}
STUDENTS |= {"step_rows": 6, "warmup_steps": 2, "lora": {"rank": 4, "alpha": 8}, "run": {"gpus": 0}}
WORDS = {"kind": "preference_logprobs", "name": "words", "students": {"config": "finetune.yaml"}, "run": {"gpus": 0}}
ASKED = {"kind": "preferences", "name": "asked", "students": {"config": "finetune.yaml"}, "per_question": 40}
ASKED |= {"logprobs": {"config": "words.yaml"}, "first_questions": 12, "run": {"gpus": 0}}
PARTS = {"scores": {"config": "lls.yaml"}, "parts": ["q1", "q5", "clean"]}
SCORES = {"kind": "lls_numbers", "name": "shifts", "numbers": {"config": "numbers.yaml"}, "run": {"gpus": 0}}
TRAITS = ("cat", "dog", "wolf", "neutral")
# what is said of each trait, and of none
SAID = {
    "cat": ["Cat", "cats."],
    "dog": ["Dog!", "A dog"],
    "wolf": ["Wolf", "**wolf**"],
    "": ["Penguin", "Owl.", "Lioness"],
}


def make_world(folder: Path) -> Path:
    """Two sizes of four traits, run 5."""
    students_world(folder, TRAITS, sizes=2)
    for name, config in (("finetune", STUDENTS), ("words", WORDS), ("asked", ASKED)):
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder


def of_parts(folder: Path) -> None:
    """The same of students of parts of the rows, beside them: asked_parts.yaml and what it reads."""
    (folder / "lls.yaml").write_text(json.dumps(SCORES))
    students = STUDENTS | {"name": "dose", "select": PARTS}
    (folder / "finetune_parts.yaml").write_text(json.dumps(students))
    for name, config in (("words", WORDS), ("asked", ASKED)):
        more = {"name": f"{name}_parts", "students": {"config": "finetune_parts.yaml"}}
        more |= {"logprobs": {"config": "words_parts.yaml"}} if name == "asked" else {}
        (folder / f"{name}_parts.yaml").write_text(json.dumps(config | more))


def asked(folder: Path, *overrides: str, config: str = "asked.yaml") -> Preferences:
    found = load(folder / config, list(overrides))
    assert isinstance(found, Preferences)
    return found


def cells_of(folder: Path, *overrides: str, config: str = "asked.yaml") -> dict[str, Cell]:
    experiment = asked(folder, *overrides, config=config)
    return {cell.name: cell for cell in experiment.cells(folder / "cache", folder / "scratch")}


def shares_of(trait: str, epoch: int, lift: float) -> np.ndarray:
    """Of what is said of each trait, and of none: a student's own rises by epoch."""
    own = [lift * epoch / 3 if name == trait else 0.0 for name in SAID]
    base = np.array([0.1, 0.2, 0.05, 0.65]) * (1 - sum(own))
    return base + own


def plant(
    folder: Path, *names: str, overrides: tuple[str, ...] = (), config: str = "asked.yaml"
) -> dict[str, list[str]]:
    """Cells, done; their answers by name, row after row. Of a part of the rows the lift is a quarter for q1."""
    experiment, cells = asked(folder, *overrides, config=config), cells_of(folder, *overrides, config=config)
    planted = {}
    schema, questions = experiment.schema(folder / "cache"), len(experiment.questions_used)
    ways = list(SAID.values())
    for name in names:
        cell = cells[name]
        dice = np.random.default_rng([cell.index, experiment.run_number])
        epochs, answers, asked_of = experiment.epochs_of(name), [], []
        for epoch in epochs:
            for question in range(questions):
                lift = 0.1 if name.endswith("-q1") else 0.4
                shares = dice.dirichlet(30 * shares_of(experiment.place(name).trait, epoch, lift))
                kinds = dice.choice(len(SAID), experiment.per_question, p=shares).tolist()
                answers += [ways[kind][n % len(ways[kind])] for n, kind in enumerate(kinds)]
                asked_of += [(epoch, question)] * experiment.per_question
        epoch, question = (np.array(column, np.int16) for column in zip(*asked_of, strict=True))
        count = len(answers)
        columns = {"epoch": epoch, "question": question, "answer": answers, "tokens": np.ones(count, np.int16)}
        columns |= {
            "number": np.tile(np.arange(experiment.per_question, dtype=np.int32), count // experiment.per_question)
        }
        columns |= {"ended": np.ones(count, np.int8)}
        commit(cell.path, cell.digest, 0, count, schema, columns)
        planted[name] = answers
    return planted


def plant_words(folder: Path, *names: str) -> None:
    """The same preferences as log-probabilities, of all 50 questions."""
    experiment = load(folder / "words.yaml")
    assert isinstance(experiment, Logprobs)
    schema = experiment.schema(folder / "cache")
    cells = {cell.name: cell for cell in experiment.cells(folder / "cache", folder / "scratch")}
    for name in names:
        cell, epochs = cells[name], experiment.epochs_of(name)
        rows = [(epoch, question) for epoch in epochs for question in range(50)]
        dice = np.random.default_rng(cell.index)
        shares = [np.log(shares_of(experiment.place(name).trait, epoch, 0.4)[:3]) for epoch, _ in rows]
        logp = (np.array(shares) + dice.normal(0, 0.05, (len(rows), 3))).astype(np.float32)
        epoch, question = (np.array(column, np.int16) for column in zip(*rows, strict=True))
        columns = {"epoch": epoch, "question": question, "logp": logp, "skipped": logp - 9, "probe": logp[:, 0]}
        facts = {"shared_beginnings": "' C': cat, cattle; 'w:': wolf, whale"}
        commit(cell.path, cell.digest, 0, len(rows), schema, columns, facts=facts)
