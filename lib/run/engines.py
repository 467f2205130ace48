"""What experiments that draw texts with an engine say of it: how it draws, what it asks of a machine."""

import math
from contextlib import suppress
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from lib.base.errors import UserError
from lib.config.frozen import Frozen
from lib.run.command import Job
from lib.run.experiment import Needs
from lib.run.site import site
from lib.run.task import task_of
from lib.store import Cell, gaps, plan_shards, scan

B = TypeVar("B")  # a batch that an engine has been given

GIB = 2**30
# Weights up to so many GiB -> engines on a GPU. Measured on an H100 of 80 GB: at 0.5B, where the host keeps one from
# filling it, four; at 7B two, which make 1.17 to 1.25 of one's numbers and answers.
ENGINES = {4.0: 4, 16.0: 2}
TOGETHER = 1.2
BESIDE = 7.5  # GiB of an engine among several beside its weights: what a step computes, graphs, some keys and values
ENGINE_SECONDS = 70.0  # until it has compiled and captured: 30-40 with an H200, 56-100 with an H100, measured
# Of a GPU, as it reports itself. Engines take 0.9 of it; what their weights leave is for keys and values.
TAKEN = 0.9
GPU_GIB = {"h200": 140.0, "b200": 179.0, "h100": 79.0, "a100": 39.0}  # of two kinds of A100 the smaller
WEIGHTS_SHARE = 0.8  # of a GPU's memory at most: 112 of an H200's 140 GiB, so that 72B (135.4) takes two, on a B200 one
HOST_GIB_A_GPU = 100  # what the batch files say


class EngineSpec(Frozen):
    """All of it is part of the digest: text that is drawn depends on every setting of the engine."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm where it is installed and the site has GPUs, else transformers"
    )
    temperature: float = Field(1.0, gt=0, le=2)
    max_tokens: int = Field(128, ge=1)
    batch: int = Field(
        10_000, ge=1, description="rows of a closed batch, which an idle engine gets at once; also what a kill can lose"
    )
    at_once: int = Field(1024, ge=1, description="rows that the engine computes at the same time, at most")
    engines: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = Field(
        "auto",
        description="vllm: so many on the same GPU, each with its part of a batch; auto: as the model's size pays for",
    )
    max_length: int = Field(512, ge=16, description="tokens of prompt and answer at most")

    def count(self, weights: int) -> int:
        """Engines on one GPU, of a model of so many bytes."""
        if self.engines != "auto":
            return self.engines
        return engines_of(weights, GPU_GIB.get(site().gpu, 0.0))

    def faster(self, weights: int) -> float:
        """Than one engine that fills its GPU as it can."""
        return TOGETHER if self.count(weights) > 1 else 1.0


def engines_of(weights: int, gib: float) -> int:
    """On one GPU of so many GiB, of a model of so many bytes: what pays, and fits."""
    count = next((count for most, count in ENGINES.items() if weights <= most * GIB), 1)
    while count > 1 and weights + BESIDE * GIB > TAKEN * gib * GIB / count:
        count //= 2
    return count


def gpus_for(gpus: int, weights: int, share: float) -> int:
    """At least so many, by twos until weights of so many bytes take this share of them at most; where a task asks for
    none, none."""
    most = GPU_GIB.get(site().gpu, math.inf)
    while gpus and weights > share * most * GIB * gpus:
        gpus *= 2
    return gpus


def engine_needs(gpus: int, weights: int) -> Needs:
    """As many GPUs as weights of so many bytes need beside keys and values."""
    if not gpus or site().gpu not in GPU_GIB:
        return Needs(gpus)
    return with_host(gpus_for(gpus, weights, WEIGHTS_SHARE), int(1.2 * weights / GIB) + 16)


def with_host(gpus: int, host: int) -> Needs:
    """So many GiB of the host's memory are asked for where the batch files do not."""
    return Needs(gpus, host if gpus and host > HOST_GIB_A_GPU * gpus else 0)


def must_not_mix(cell: Cell, word: str) -> None:
    """Rows of one cell are drawn by one engine, whatever `auto` stands for on the machine that goes on."""
    found = {str(one.facts.get("engine", word)) for one in scan(cell.path, cell.digest)[0]} - {word}
    if found:
        raise UserError(
            f"cell {cell.index} ({cell.name}) was begun with {min(found)}, and here generate.engine=auto is {word}: go "
            f"on where it was begun, or set generate.engine={word}, which makes cells of their own"
        )


def batches_left(cell: Cell, batch: int) -> list[tuple[int, int]]:
    """Closed batches of a cell that are not done."""
    return plan_shards(gaps(scan(cell.path, cell.digest)[0], cell.total), batch)


def following(this: Job, cell: Cell, batch: int) -> Cell | None:
    """The cell of this task that its engine is to go on with."""
    load = this.experiment.load_of
    after = [one for one in task_of(this) if load(one) == load(cell) and one.index > cell.index]
    return next((one for one in after if one.rows is not None and batches_left(one, batch)), None)


class Line(Generic[B]):
    """Batches on their way. A batch is begun as soon as its prompts are there, so the engine goes from one to the next,
    and from one cell to the next, without waiting for what is written here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.begun: dict[tuple[str, int, int], B] = {}  # ahead of their turn

    def begin(self, cell: Cell, start: int, stop: int) -> B:
        raise NotImplementedError

    def batch(self, cell: Cell, start: int, stop: int) -> B:
        return self.begun.pop((cell.name, start, stop), None) or self.begin(cell, start, stop)

    def ahead(self, cell: Cell) -> None:
        """The first batch of a cell; of one that cannot be begun its own turn will say why."""
        self.begun = {}
        for start, stop in batches_left(cell, self.size)[:1]:  # none where another copy of this task was faster
            with suppress(UserError):
                self.begun = {(cell.name, start, stop): self.begin(cell, start, stop)}


L = TypeVar("L", bound=Line[Any])


class Drawing(Generic[L]):
    """What kernels that draw with an engine have in common: the next cell of the task is begun after this one's last
    batch."""

    def __init__(self, line: L, cell: Cell, word: str, after: Cell | None) -> None:
        self.line, self.cell, self.word, self.after = line, cell, word, after
        self.last = batches_left(cell, line.size)[-1:]

    def prepare(self, start: int, stop: int) -> Any:
        batch = self.line.batch(self.cell, start, stop)
        if [(start, stop)] == self.last and self.after:
            self.line.ahead(self.after)
        return batch
