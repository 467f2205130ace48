"""A student's training: a low-rank adapter on a base that stays loaded, taught a teacher's numbers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.base.errors import DONE, UserError
from lib.inputs.verified import checked_model
from lib.lora.experiment import Finetune
from lib.lora.metrics import Board, Step, must_import, read_lines, write_lines
from lib.lora.recipe import Row, Trainer
from lib.lora.schedule import Schedule
from lib.numbers.dataset import training_rows
from lib.run.command import Job
from lib.run.steps import run_steps
from lib.run.task import run_task
from lib.store import Cell, read_cell

if TYPE_CHECKING:
    from lib.lora.plain import PlainTrainer

LOOKED_AT = 3  # after so many steps the adapter must have changed


def compute(this: Job) -> int:
    experiment = this.of(Finetune)
    schedule = experiment.schedule()

    def work(cell: Cell) -> int:
        student = Student(this, experiment, cell, schedule)
        code = 1
        try:
            code = run_steps(
                cell,
                student.load,
                every=experiment.run.state_steps or schedule.steps_an_epoch,
                keep=[epoch * schedule.steps_an_epoch for epoch in range(1, experiment.epochs + 1)],
                log_seconds=experiment.run.log_seconds,
                gpus=experiment.run.gpus,
            )
            return code
        finally:
            student.close(code)

    return run_task(this, work)


class Student:
    """What one cell needs beside the base: its rows and where its figures go."""

    def __init__(self, this: Job, experiment: Finetune, cell: Cell, schedule: Schedule) -> None:
        self.this, self.experiment, self.cell, self.schedule = this, experiment, cell, schedule
        self.board: Board | None = None

    def load(self) -> tuple["FinetuneKernel", dict[str, Any]]:
        e = self.experiment
        if e.wandb.mode != "off":
            must_import()  # before a model is loaded
        rows = self._rows()
        trainer, about = self.this.keep("trainer", (e.label, e.load_of(self.cell)), self._trainer)
        if e.wandb.mode != "off":
            self.board = e.board(self.cell)
        targets = trainer.targets
        config = e.adapter_config(self.cell, targets)
        return FinetuneKernel(trainer, rows, self.schedule, config, self.board.log if self.board else None), about
