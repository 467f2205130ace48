"""Figures that compute nodes kept for Weights & Biases, sent from where there is a network."""

import subprocess
import sys
from pathlib import Path

from lib.base.errors import UserError
from lib.cluster.status import status
from lib.lora.experiment import Finetune
from lib.lora.metrics import FOLDER, must_import, run_id
from lib.run.command import Job


def sync(this: Job) -> int:
    """All runs that have ended: one that is sent while it goes on would count as sent."""
    experiment = this.of(Finetune)
    must_import()
    cells = this.cells()
    now = {cell.name: cell.state for cell in status(experiment.label, cells).cells}
    on = {run_id(cell): cell.name for cell in cells if now[cell.name] in ("running", "starting")}
    runs = sorted((this.folder / FOLDER).glob("offline-run-*"))
    ended = [run for run in runs if _id(run) not in on]
    if not runs:
        raise UserError(f"{this.folder} holds no figures to send: train with SET=wandb.mode=offline")
    for name in sorted({on[_id(run)] for run in runs if _id(run) in on}):
        print(f"{name} still goes on: its figures are left for later")
    if ended and subprocess.call([sys.executable, "-m", "wandb", "sync", "--yes", *map(str, ended)]):
        raise UserError(
            "wandb could not send them (see above); run `wandb login`, or set WANDB_API_KEY, where there is a network"
        )
    return 0


def _id(run: Path) -> str:
    return run.name.rpartition("-")[2]
