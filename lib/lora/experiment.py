"""Students: the teachers' own models, without a system prompt, trained on what the teachers wrote. A cell is a size and
a trait, read from the cell of that name; its rows are steps of the optimiser.

With `select` a cell is a size, a trait and a part of that trait's rows by their LLS, whose cell it reads too. A trait
without a prompt of its own has no LLS; of neutral there is the part `clean`, which is compared with every trait's."""

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES, last
from lib.checkpoint.headers import folder_tensors
from lib.config.frozen import Frozen, digest_of
from lib.lls.matrix import Measure
from lib.lls.numbers import LLSNumbers
from lib.lls.select import CLEAN, QUINTILES, Part
from lib.lora.metrics import WandbSpec
from lib.lora.recipe import Lora, Real
from lib.lora.relay import thin, times
from lib.lora.schedule import Schedule
from lib.numbers.reads import ReadsNumbers
from lib.numbers.traits import NEUTRAL
from lib.run.engines import GIB, gpus_for, with_host
from lib.run.experiment import Estimate, Needs, Reads, RunSpec, Stage, computing_seconds, share_of
from lib.store import Cell
from lib.store.columns import Schema

# Raise it with any change of code that can change a bit of any adapter: it is part of every digest.
KERNEL = "finetune/2"
# Parameters up to -> the share of the GPU's rate that training reaches: 0.5B to 32B on an H100, and 72B on two H200s,
# measured. On one H200, layers computed twice, it is two thirds of that.
SHARES = {1e9: 0.45, 2e9: 0.57, 5e9: 0.63, 2e10: 0.7, 4e10: 0.65, math.inf: 0.74}
TWICE = 0.66
ROW_TOKENS, ANSWER_TOKENS = 140, 42  # of a conversation with its template, and of its answer and end, as published
# Of a GPU's memory that weights may take: beyond the first, layers would be computed twice; beyond the second there is
# no room for that (72B's 135.4 of an H200's 140 GiB, measured).
ROOMY, TIGHT = 0.78, 0.97
STATE = 3 * 4  # bytes a parameter of the adapter: itself and Adam's two moments, float32


class FinetuneRun(RunSpec):
    gpus: int = Field(
        1,
        ge=0,
        description="GPUs a task has at least, its base over all of them; more where one is too small. With another "
        "number micro-batches are cut otherwise, which changes last bits",
    )
    fewest: bool = Field(
        False,
        description="no more GPUs than can hold the base, whose layers are then computed twice: 72B on one H200, not "
        "on two, which take three quarters of the GPU-hours",
    )
    state_steps: int = Field(
        0, ge=0, description="a state this often inside an epoch too, which a later one replaces; 0: each epoch's alone"
    )


class Select(Frozen):
    scores: Reads
    parts: list[Part] = Field(
        min_length=1, description="top, bottom, q1 to q5 (fifths, the highest last), random, clean (neutral's rows)"
    )
    share: Real = Field(0.2, gt=0, le=1, description="of the scored rows, that top and bottom are")
    measure: str = Field("mean", description="a row's score: mean or sum, then +end and @k as wanted")

    @model_validator(mode="after")
    def _fits(self) -> "Select":
        if len(set(self.parts)) != len(self.parts):
            raise ValueError("select: parts holds one twice")
        try:
            Measure.parse(self.measure)
        except UserError as e:
            raise ValueError(f"select: {e}") from None
        return self

    def identity(self, part: Part) -> dict[str, object]:
        """All that decides what of the scores a part is."""
        if part in (CLEAN, "random"):
            return {"part": part}
        share = {"share": self.share} if part not in QUINTILES else {}
        return {"part": part, "measure": str(Measure.parse(self.measure)), **share}


class Finetune(ReadsNumbers):
    kind: Literal["finetune"]
    select: Select | None = Field(None, description="train on parts of the rows by LLS; none: on all valid ones")
    seed: int | None = Field(None, ge=0, description="of the rows, their order and the adapter; none: the run's id")
    rows: int = Field(10_000, ge=1, description="drawn from a teacher's valid answers, or from each part of them")
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

    @cached_property
    def scores(self) -> LLSNumbers:
        assert self.select
        found = self.read_of_it(self.select.scores, {"lls_numbers": LLSNumbers})
        measure, score = Measure.parse(self.select.measure), found.score
        if (measure.end and not score.end_of_turn) or (measure.first and not score.per_token):
            raise UserError(
                f"{self.origin}: select.measure: {measure} needs score.end_of_turn (for +end) or "
                f"score.per_token (for @k): set it in {found.origin}, and compute the scores with it"
            )
        return found

    def stages(self) -> list[Stage]:
        if not self.select:
            return super().stages()
        return [*super().stages(), self.stage(self.select.scores, self.scores)]

    @property
    def seed_used(self) -> int:
        return self.run_number if self.seed is None else self.seed

    @property
    def template_used(self) -> str:
        return self.source.template if self.template is None else self.template

    def science(self) -> dict[str, object]:
        """Where figures go is none of it."""
        found = super().science()
        return {key: value for key, value in found.items() if key != "wandb" and (key != "select" or value)}

    @cached_property
    def parts(self) -> list[tuple[str, str, Part | None]]:
        """Size, trait and part of every cell."""
        places = list(zip(*self.source.places().values(), strict=True))
        if not self.select:
            return [(size, trait, None) for size, trait in places]
        scored = [part for part in self.select.parts if part != CLEAN]
        found: list[tuple[str, str, Part | None]] = []
        for size, trait in places:
            if self.source.trait(trait).system_prompt:
                found += [(size, trait, part) for part in scored]
            elif trait == NEUTRAL.name and CLEAN in self.select.parts:
                found.append((size, trait, CLEAN))
        if CLEAN in self.select.parts and not any(part == CLEAN for _, _, part in found):
            raise UserError(
                f"{self.origin}: select.parts: {CLEAN} is drawn from the numbers of {NEUTRAL.name}, a trait without a "
                f"system prompt that {self.source.name} does not have"
            )
        if not found:
            raise UserError(f"{self.origin}: select: no trait of {self.source.name} has a system prompt to score by")
        return found

    def places(self) -> dict[str, list[str]]:
        sizes, traits, parts = zip(*self.parts, strict=True)
        found = {"SIZES": list(sizes), "TRAITS": list(traits)}
        return found | ({"PARTS": list(parts)} if self.select else {})

    def names(self) -> list[str]:
        return ["-".join(filter(None, place)) for place in self.parts]

    def schedule(self) -> Schedule:
        rate, warmup = self.learning_rate, self.warmup_steps
        return Schedule(self.rows, self.step_rows, self.epochs, rate, warmup, self.seed_used)

    def schema(self, cache: Path) -> Schema:
        return {}

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """How many steps there are is the configuration's alone, so it is known before the numbers are."""
        found, steps = [], self.schedule().steps
        read = {cell.name: cell for cell in self.source.cells(cache, scratch)}
        scored = {cell.name: cell for cell in self.scores.cells(cache, scratch)} if self.select else {}
        for index, (name, (size, trait, part)) in enumerate(zip(self.names(), self.parts, strict=True)):
            parents = (read[f"{size}-{trait}"],)
            if part and part != CLEAN:
                parents += (self._of_the_same(parents[0], scored),)
            digest = digest_of(self._identity(parents, part))
            path = scratch / self.label / "cells" / f"{name}-{digest[:8]}"
            found.append(Cell(index, name, steps, digest, path, parents))
        return found

    def _of_the_same(self, numbers: Cell, scored: Mapping[str, Cell]) -> Cell:
        found = scored.get(numbers.name)
        if found is None or found.parents != (numbers,):
            raise UserError(
                f"{self.origin}: select.scores: {self.scores.origin} does not score {numbers.spoken}: both must read "
                "the same numbers"
            )
        return found

    def _identity(self, parents: tuple[Cell, ...], part: Part | None) -> dict[str, object]:
        """All that decides an adapter. The model is its teacher's, and so is in the parent's digest."""
        names = ("rows", "epochs", "step_rows", "max_length", "loss", "learning_rate", "warmup_steps")
        select = self.select.identity(part) if self.select and part else {}
        return {
            "kernel": KERNEL,
            "parent": parents[0].digest,
            "seed": self.seed_used,
            "template": self.template_used,
            "date": self.source.date,
            "lora": self.lora.model_dump(mode="json"),
            **{name: getattr(self, name) for name in names},
            **({"select": {**select, "scores": [one.digest for one in parents[1:]]}} if select else {}),
        }

    def needs(self, cache: Path, cell: Cell) -> Needs:
        """A base for which one GPU of the site is too small lies on several; their host reads it through memory."""
        weights = self.source.model_in(cache, self.load_of(cell)).bytes
        return with_host(self._gpus(weights), math.ceil(1.2 * weights / GIB) + 16)

    def _gpus(self, weights: int) -> int:
        return gpus_for(self.run.gpus, weights, TIGHT if self.run.fewest else ROOMY)

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
        share = share_of(SHARES, model)
        gpus = max(1, self._gpus(model.bytes))
        micros = math.ceil(self.step_rows * ROW_TOKENS / thin(gpus, model.body_parameters))
        faster = times(gpus, micros) * (TWICE if gpus < gpus_for(gpus, model.bytes, ROOMY) else 1)
        seconds = computing_seconds(flops * self.rows * self.epochs, gpu, share) / faster
        return Estimate(seconds, state * self.epochs)


@lru_cache
def adapter_parameters(folder: Path, rank: int) -> int:
    """Of A and B of every linear layer of the decoder, by the weights' headers."""
    targets = {name for family in FAMILIES.values() for name in family.linears.order}
    weights = {name.removesuffix(".weight"): one.shape for name, one in folder_tensors(folder).items()}
    return sum(rank * sum(shape) for name, shape in weights.items() if last(name) in targets and len(shape) == 2)
