"""A student's training: a low-rank adapter on a base that stays loaded, taught a teacher's numbers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lib.base.errors import DONE, UserError
from lib.inputs.records import ModelSizes, model_sizes
from lib.inputs.verified import checked_model
from lib.lora.drawn import rows_of
from lib.lora.experiment import Finetune
from lib.lora.metrics import Board, Step, must_import, read_lines, write_lines
from lib.lora.rows import Row
from lib.lora.schedule import Schedule
from lib.run.command import Job
from lib.run.steps import run_steps
from lib.run.task import run_task, task_of
from lib.store import Cell, read_cell

if TYPE_CHECKING:
    import torch

    from lib.models.chat import Renderer


class Trainer(Protocol):
    """A resident base under one student's adapter. Adapter and moments are float32, whatever the base is."""

    def begin(self, seed: int) -> None:
        """A fresh adapter, by the seed alone."""
        ...

    def step(
        self, rows: Sequence[Row], learning_rate: float, number: int, following: Sequence[Row] = ()
    ) -> dict[str, float]:
        """One step of the optimiser, the number-th (from 1), over all rows at once: the loss is the mean over all
        their scored tokens. Returns loss, grad_norm, tokens, scored. `following`: the next step's rows."""
        ...

    def state(self) -> "dict[str, torch.Tensor]":
        """On the CPU: A and B under peft's names, and Adam's moments, adam.m. and adam.v. before the same names."""
        ...

    def load(self, state: "dict[str, torch.Tensor]") -> None: ...


LOOKED_AT = 3  # after so many steps the adapter must have changed


def compute(this: Job) -> int:
    experiment = this.of(Finetune)
    schedule, desk = experiment.schedule(), Desk(this, experiment)

    def work(cell: Cell) -> int:
        student, code = Student(this, experiment, cell, desk), 1
        try:
            code = run_steps(
                cell,
                student.load,
                every=experiment.run.state_steps or schedule.steps_an_epoch,
                keep=[epoch * schedule.steps_an_epoch for epoch in range(1, schedule.epochs + 1)],
                log_seconds=experiment.run.log_seconds,
                gpus=experiment.needs(this.site.cache, cell).gpus,
            )
        finally:
            student.close(code)
        return code

    return run_task(this, work)


class Desk:
    """Rows of the task's students, which are of one size: the next one's are made while the one before is trained."""

    def __init__(self, this: Job, experiment: Finetune) -> None:
        self.this, self.experiment = this, experiment
        self.following = dict(pairwise(task_of(this)))
        self.behind, self.ahead = ThreadPoolExecutor(1), dict[Cell, Future[list[Row]]]()

    def rows(self, cell: Cell, path: str) -> list[Row]:
        e = self.experiment
        renderer = self.this.keep("renderer", path, lambda: load_renderer(e, path))  # a fork, before there is CUDA
        found = self.ahead.pop(cell, None)
        if found is None or found.exception():  # what it reads from may have come since
            found = self.behind.submit(self._rows, cell, path, renderer)
        rows = found.result()
        if after := self.following.get(cell):
            self.ahead[after] = self.behind.submit(self._rows, after, path, renderer)
        return rows

    def _rows(self, cell: Cell, path: str, renderer: "Renderer") -> list[Row]:
        from lib.lora.chat_rows import as_rows

        e, cache = self.experiment, self.this.site.cache
        read = read_cell(cell.parents[0], e.source.schema(cache), ["prompt", "answer", "reason"])
        prompts, answers = read["prompt"], read["answer"]
        drawn = rows_of(e, cache, cell, read["reason"])
        rows = as_rows(renderer, [prompts[i] for i in drawn], [answers[i] for i in drawn], e.loss, e.max_length)
        must_suit(rows, model_sizes(Path(path)))
        return rows


class Student:
    """A cell: the base that it shares with the others of its task, and where its figures go."""

    def __init__(self, this: Job, experiment: Finetune, cell: Cell, desk: Desk) -> None:
        self.this, self.experiment, self.cell, self.desk = this, experiment, cell, desk
        self.board: Board | None = None

    def load(self) -> tuple["FinetuneKernel", dict[str, str]]:
        e, spec = self.experiment, self.experiment.model_of(self.cell)
        if e.wandb.mode != "off":
            must_import()  # before a GPU is used
        path = checked_model(self.this.site.cache, spec.id, spec.revision).path
        rows = self.desk.rows(self.cell, path)
        gpus = e.needs(self.this.site.cache, self.cell).gpus
        trainer, about = self.this.keep("trainer", (path, spec.dtype), lambda: load_trainer(e, path, spec.dtype, gpus))
        if e.wandb.mode != "off":
            self.board = Board(e.wandb, self.cell, {**e.science(), "run_id": e.run_number})
        kernel = FinetuneKernel(trainer, rows, e.schedule(), self._config(path))
        kernel.log = self.board.log if self.board else None
        return kernel, about

    def _config(self, path: str) -> dict[str, object]:
        from lib.lora.peft_form import config_of, targets_in

        spec = self.experiment.model_of(self.cell)
        return config_of(self.experiment.lora, targets_in(path), spec.id, spec.revision)

    def close(self, code: int) -> None:
        if self.board:
            self.board.close(int(code != DONE))


def must_suit(rows: Sequence[Row], model: ModelSizes) -> None:
    """Ids that the model has, and no more of them than it was made for."""
    from lib.models.tokens import must_know

    if model.vocab_size:
        must_know(min(min(row.ids) for row in rows), max(max(row.ids) for row in rows), model.vocab_size)
    longest = max(len(row.ids) for row in rows)
    if 0 < model.max_position_embeddings < longest:
        raise UserError(
            f"a row of {longest} tokens is longer than the model's {model.max_position_embeddings} positions; lower "
            "max_length"
        )


def load_renderer(experiment: Finetune, path: str) -> "Renderer":
    from lib.inputs.tokenizer import load_tokenizer
    from lib.models.chat import Renderer

    return Renderer(load_tokenizer(path), None, experiment.template_used, experiment.source.date)


def load_trainer(experiment: Finetune, path: str, dtype: str, gpus: int) -> tuple[Trainer, dict[str, str]]:
    """The fast one where it knows the model and the recipe, else peft's own layers."""
    from lib.lora.plain import PlainTrainer
    from lib.lora.trainer import load_fast, trains_fast
    from lib.models.load import device_name, visible_devices

    e, device, began = experiment, visible_devices()[0], time.monotonic()
    fast = trains_fast(path, e.lora)
    trainer: Trainer
    if fast:
        trainer = load_fast(path, e.lora, dtype, e.step_rows, e.max_length, gpus)
    elif gpus > 1:
        raise UserError(
            f"this model or recipe is trained by peft's own layers, which lie on one GPU, and the task has {gpus}: set "
            "run.gpus=1 and take a size that one GPU holds, or see README, Students, for what is trained on several"
        )
    else:
        trainer = PlainTrainer(path, e.lora, dtype, device)
    how = "fused" if fast else "plain peft"
    print(f"base loaded in {time.monotonic() - began:.1f} s, trained by {how} layers", flush=True)
    return trainer, {"device": device_name(device), "trainer": how}


class FinetuneKernel:
    """A StepKernel. All that decides the next step is the adapter, Adam's moments and the step's number."""

    log: Callable[[Step], None] | None = None

    def __init__(self, trainer: Trainer, rows: Sequence[Row], schedule: Schedule, config: Mapping[str, object]) -> None:
        self.trainer, self.rows, self.schedule, self.config = trainer, rows, schedule, config

    def restore(self, folder: Path | None, step: int) -> None:
        from lib.lora.peft_form import load_adapter

        self.number, self.lines = step, read_lines(folder) if folder else []
        self.following: list[Row] = []
        self.trainer.begin(self.schedule.seed)
        if folder:
            self.trainer.load(load_adapter(folder))

    def advance(self) -> dict[str, int | float | str]:
        number, rate = self.number + 1, self.schedule.rate(self.number + 1)
        rows = self.following or self._rows_of(number)
        self.following = self._rows_of(number + 1) if number < self.schedule.steps else []
        said = self.trainer.step(rows, rate, number, self.following)
        if not (math.isfinite(said["loss"]) and math.isfinite(said["grad_norm"])):
            raise UserError(
                f"step {number} of {self.schedule.steps} gave a loss of {said['loss']} and a gradient of norm "
                f"{said['grad_norm']}: nothing of it is kept, and the same would come again; lower learning_rate "
                f"({self.schedule.learning_rate:g})"
            )
        self.number = number
        if number == min(LOOKED_AT, self.schedule.steps):
            must_have_changed(self.trainer.state(), number)
        figures = {name: int(said[name]) for name in ("tokens", "scored")}
        step = Step(number, self.schedule.epoch_of(number), said["loss"], rate, said["grad_norm"], **figures)
        self.lines.append(step.line())
        if self.log:
            self.log(step)
        return {"rows": len(rows), **figures}

    def _rows_of(self, number: int) -> list[Row]:
        return [self.rows[i] for i in self.schedule.rows_of(number)]

    def snapshot(self) -> Callable[[Path], None]:
        from lib.lora.peft_form import save_adapter

        state, lines = self.trainer.state(), list(self.lines)

        def save(folder: Path) -> None:
            save_adapter(folder, state, self.config)
            write_lines(folder, lines)

        return save


def must_have_changed(state: Mapping[str, "torch.Tensor"], steps: int) -> None:
    """B begins with 0, and stays 0 where no gradient reaches it."""
    from lib.lora.peft_form import adapter_of

    if not any(tensor.any() for name, tensor in adapter_of(state).items() if "lora_B" in name):
        raise UserError(
            f"after {steps} steps every lora_B is still 0, so that the student is its base: no gradient reaches the "
            "adapter, or its rate was 0; train for more steps, or report it with the model's id"
        )
