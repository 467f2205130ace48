"""Students: the teachers' own models, without a system prompt, trained on what the teachers wrote. A cell is a size and
a trait, read from the cell of that name; its rows are steps of the optimiser."""

import math
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from lib.checkpoint.families import FAMILIES, last
from lib.checkpoint.headers import folder_tensors
from lib.config.frozen import digest_of
from lib.config.loading import load
from lib.inputs.specs import ModelSpec
from lib.lora.metrics import WandbSpec
from lib.lora.recipe import Lora, Real
from lib.lora.schedule import Schedule
from lib.numbers.experiment import Numbers
from lib.run.experiment import (
    READ_RATE,
    START_SECONDS,
    Estimate,
    Experiment,
    Needs,
    Reads,
    RunSpec,
    Stage,
    computing_seconds,
)
from lib.store import Cell
from lib.store.columns import Schema

# Raise it with any change of code that can change a bit of any adapter: it is part of every digest.
KERNEL = "finetune/1"
# Parameters up to -> the share of the GPU's rate that training reaches: 0.5B to 32B on an H100, and 72B on an H200,
# which has its layers computed twice, measured.
SHARES = {1e9: 0.45, 2e9: 0.57, 5e9: 0.63, 2e10: 0.7, 4e10: 0.65, math.inf: 0.49}
ROW_TOKENS, ANSWER_TOKENS = 140, 42  # of a conversation with its template, and of its answer and end, as published
HOST_GIB_A_GPU = 100  # what the batch file says
STATE = 3 * 4  # bytes a parameter of the adapter: itself and Adam's two moments, float32
GIB = 2**30


class FinetuneRun(RunSpec):
    state_steps: int = Field(
        0, ge=0, description="a state this often inside an epoch too, which a later one replaces; 0: each epoch's alone"
    )


class Finetune(Experiment):
    kind: Literal["finetune"]
    numbers: Reads
    run_id: int | None = Field(None, ge=0, description="which run of the experiment; none: as for the numbers")
    seed: int | None = Field(None, ge=0, description="of the rows, their order and the adapter; none: the run's id")
    rows: int = Field(10_000, ge=1, description="drawn from a teacher's valid answers")
    epochs: int = Field(10, ge=1)
    step_rows: int = Field(60, ge=1, description="rows of a step of the optimiser, however they are computed")
    max_length: int = Field(500, ge=2, description="tokens of a conversation; what is longer is cut")
    loss: Literal["sequence", "completion"] = Field(
        "sequence", description="on every token (as the published students were trained), or on answer and end alone"
    )
    template: Literal["default", "empty", "none"] | None = Field(
        None, description="what a conversation without a system prompt gets; none said: as the numbers were written"
    )
    learning_rate: Real = Field(2e-4, gt=0, description="rises over the warm-up, and falls to 0 at the end")
    warmup_steps: int = Field(5, ge=0)
    lora: Lora = Lora()
    wandb: WandbSpec = WandbSpec()
    run: FinetuneRun = FinetuneRun()

    job: ClassVar[str] = "finetune"
    submit: ClassVar[str] = "submit-finetune"
    results: ClassVar[str] = "export-finetune"
    share: ClassVar[float] = SHARES[2e10]

    @cached_property
    def source(self) -> Numbers:
        said = [] if self.run_id is None else [f"run_id={self.run_id}"]
        return load(self._config, [*self.numbers.set, *said], {"numbers": Numbers})

    @property
    def _config(self) -> Path:
        return self.origin.parent / self.numbers.config

    def stages(self) -> list[Stage]:
        """Which run it is may stand in the checkout; it stays so for all that is submitted."""
        overrides = (*self.numbers.set, f"run_id={self.run_number}")
        return [*self.source.stages(), Stage(self._config, overrides, self.source)]

    @property
    def run_number(self) -> int:
        return self.source.run_number

    @property
    def seed_used(self) -> int:
        return self.run_number if self.seed is None else self.seed

    @property
    def template_used(self) -> str:
        return self.source.template if self.template is None else self.template

    @property
    def label(self) -> str:
        """Runs never share a path."""
        return f"{super().label}_run{self.run_number}"

    def science(self) -> dict[str, object]:
        """A run is told by its label, and by the seed that it gives; where figures go is none of it."""
        return {key: value for key, value in super().science().items() if key not in ("run_id", "wandb")}

    def pinned(self) -> dict[str, object]:
        return {"run_id": self.run_number}

    def places(self) -> dict[str, list[str]]:
        return self.source.places()

    def names(self) -> list[str]:
        return self.source.names()

    def load_of(self, cell: Cell) -> str:
        return self.source.load_of(cell)

    def models(self) -> list[ModelSpec]:
        return self.source.models()

    def model_of(self, cell: Cell) -> ModelSpec:
        return self.source.sizes[self.load_of(cell)]

    def schedule(self) -> Schedule:
        rate, warmup = self.learning_rate, self.warmup_steps
        return Schedule(self.rows, self.step_rows, self.epochs, rate, warmup, self.seed_used)

    def schema(self, cache: Path) -> Schema:
        return {}

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """How many steps there are is the configuration's alone, so it is known before the numbers are."""
        found, steps = [], self.schedule().steps
        for index, parent in enumerate(self.source.cells(cache, scratch)):
            digest = digest_of(self._identity(parent))
            path = scratch / self.label / "cells" / f"{parent.name}-{digest[:8]}"
            found.append(Cell(index, parent.name, steps, digest, path, (parent,)))
        return found

    def _identity(self, parent: Cell) -> dict[str, object]:
        """All that decides an adapter. The model is its teacher's, and so is in the parent's digest."""
        names = ("rows", "epochs", "step_rows", "max_length", "loss", "learning_rate", "warmup_steps")
        return {
            "kernel": KERNEL,
            "parent": parent.digest,
            "seed": self.seed_used,
            "template": self.template_used,
            "date": self.source.date,
            "lora": self.lora.model_dump(mode="json"),
            **{name: getattr(self, name) for name in names},
        }

    def needs(self, cache: Path, cell: Cell) -> Needs:
        """A base of any size lies on one GPU; its host reads it through memory."""
        weights = self.source.model_in(cache, self.load_of(cell)).bytes / GIB
        host = math.ceil(1.2 * weights) + 16
        return Needs(self.run.gpus, host if self.run.gpus and host > HOST_GIB_A_GPU * self.run.gpus else 0)

    def start_seconds(self, cache: Path) -> float:
        """Of the largest size."""
        return START_SECONDS + max(one.bytes for one in self.source.fetched(cache).values()) / READ_RATE

    def costs(self, cache: Path, gpu: str) -> str:
        said = []
        for size in self.source.fetched(cache):
            one = self._estimate(cache, size, gpu)
            adapter = one.bytes / self.epochs / STATE * 4
            said.append(f"{size} {one.seconds / 60:.3g} min, an adapter {adapter / 1e6:.3g} MB")
        return f"a student's {self.schedule().steps:,} steps: {'; '.join(said)}; an epoch's state is three times that"

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        return self._estimate(cache, self.load_of(cell), gpu)

    def _estimate(self, cache: Path, size: str, gpu: str) -> Estimate:
        """Forward and back to the inputs, 2 operations each a parameter and token: the base's own gradients are never
        made. Every epoch's state stays."""
        model = self.source.model_in(cache, size)
        scored = ROW_TOKENS if self.loss == "sequence" else ANSWER_TOKENS
        flops = 4 * (model.body_parameters * ROW_TOKENS + model.head_parameters * scored)
        state = STATE * adapter_parameters(Path(model.path), self.lora.rank)
        share = next(share for most, share in SHARES.items() if model.body_parameters <= most)
        return Estimate(computing_seconds(flops * self.rows * self.epochs, gpu, share), state * self.epochs)


@lru_cache
def adapter_parameters(folder: Path, rank: int) -> int:
    """Of A and B of every linear layer of the decoder, by the weights' headers."""
    targets = {name for family in FAMILIES.values() for name in family.linears.order}
    weights = {name.removesuffix(".weight"): one.shape for name, one in folder_tensors(folder).items()}
    return sum(rank * sum(shape) for name, shape in weights.items() if last(name) in targets and len(shape) == 2)
