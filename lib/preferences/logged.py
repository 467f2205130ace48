"""Preferences by epoch among the figures of the trainings that they came of: a line an epoch beside a student's
exported metrics, and in its own run of Weights & Biases, where the training has one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.base.atomic import keep_others, read_json, write_bytes, write_json
from lib.lora.experiment import Finetune
from lib.lora.metrics import Board, run_id
from lib.preferences.judge import DEFAULT
from lib.preferences.statistics import rate_of
from lib.preferences.tally import Tally
from lib.store import Cell

FILE, RECORD = "preferences.jsonl", "preferences_provenance.json"


def lines(trait: str, found: Mapping[int, Tally], traits: list[str]) -> list[dict[str, Any]]:
    """`trait`: what the student was taught; where it is none of `traits`, there is no target."""
    rows: list[dict[str, Any]] = []
    for epoch, one in found.items():
        row: dict[str, Any] = {"epoch": epoch, "answers": one.total, "judge": DEFAULT, "target": None}
        if trait in traits:
            place = traits.index(trait)
            seen = rate_of(one.hits[DEFAULT][place], one.answers)
            low, high = seen.clustered
            row |= {"target": trait, "rate": seen.share, "low": low, "high": high}
        rows.append(row | {"rates": {name: one.rate(DEFAULT, t) for t, name in enumerate(traits)}})
    return rows


def write_lines(folder: Path, cell: Cell, student: Cell, experiment: Finetune, rows: list[dict[str, Any]]) -> bool:
    """False where Weights & Biases did not take them; the next export tries again."""
    path, record = folder / FILE, folder / RECORD
    before = read_json(record) or {}
    keep_others(cell.digest, before.get("digest"), path, record)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sent = before.get("digest") == cell.digest and bool(before.get("wandb"))
    off = experiment.wandb.mode == "off"
    if not off and not sent:
        sent = _send(student, experiment, rows)
    write_bytes(path, data)
    write_json(record, {"digest": cell.digest, "student": student.digest, "wandb": run_id(student) if sent else None})
    return sent or off


def _send(student: Cell, experiment: Finetune, rows: list[dict[str, Any]]) -> bool:
    board = Board(experiment.wandb, student, {**experiment.science(), "run_id": experiment.run_number})
    figures = []
    for row in rows:
        target = {"preference/target": row["rate"]} if row["target"] else {}
        figures.append({"epoch": row["epoch"], **target, **{f"preference/{k}": v for k, v in row["rates"].items()}})
    taken = board.log_epochs("preference/*", figures)
    board.close(0)
    return taken and board.run is not None
