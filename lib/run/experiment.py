"""What every experiment is: a configuration, inputs by reference, cells, what they cost and what they ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lib.config.frozen import Configuration, Frozen
from lib.inputs.records import ModelInput, model_input
from lib.inputs.specs import DatasetSpec, ModelSpec, TokenSets
from lib.store import Cell
from lib.store.columns import Schema

# bf16 matmul TFLOP/s. h200: 8192^3 with torch 2.11 on an H200, measured. The others: data-sheet dense figures times the
# 0.80 of its own that the H200 reached. cpu: float32 on two cores.
TFLOPS = {"h200": 790.0, "b200": 1800.0, "h100": 790.0, "a100": 250.0, "cpu": 0.08}
SPREAD = 0.9  # of so many times one GPU's rate: 0.84 to 0.93 of twice, scoring over two H200s, measured
START_SECONDS = 9.0  # of a task, before its weights: Python, torch, CUDA; of 12.5 s at 0.5B, 3.5 s computing, measured
READ_RATE = 1.5e9  # bytes/s of weights, from a network file system; 2.9e9 from a local disk, measured
START_SHARE = 0.1  # of a task at most, where run.cells is auto


class RunSpec(Frozen):
    """How the work is cut and watched. Nothing here can change a result, so nothing here is in the digest."""

    shard_rows: int = Field(1024, ge=1, description="rows committed at once: what a kill can lose")
    log_seconds: float = Field(30.0, gt=0, description="one plain progress line this often in a log")
    gpus: int = Field(1, ge=0, description="GPUs a task uses, for the estimate and the GPU-hours")
    cells: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="cells of a task at most, which share one load; auto: until starting takes a tenth of it"
    )


@dataclass(frozen=True)
class Estimate:
    """What a cell takes."""

    seconds: float  # computing all its rows, on the GPUs that its task has
    bytes: int  # of all its pieces, before compression


@dataclass(frozen=True)
class Needs:
    """What a task asks for; tasks that ask for different things are different arrays."""

    gpus: int
    memory_gib: int = 0  # of the host, for the whole task; 0: what the batch file says


class Reads(Frozen):
    """Another experiment whose cells are read."""

    config: str = Field(min_length=1, description="its configuration, beside this one's")
    set: list[str] = Field(default=[], description="overrides of it, key=value")


@dataclass(frozen=True)
class Stage:
    """An experiment that another one reads from, and how it is named to a job."""

    config: Path
    overrides: tuple[str, ...]
    experiment: "Experiment"


class Experiment(Configuration):
    run: RunSpec = RunSpec()

    job: ClassVar[str]  # jobs/<job>.py and slurm/<job>.sbatch
    submit: ClassVar[str] = "submit"  # make targets: to submit it, and to get its results
    results: ClassVar[str] = "verify"
    share: ClassVar[float] = 0.0  # of the GPU's matmul rate, what the job reaches; for the estimate. 0: it goes by size
    # A stage that needs a network, or no GPU, goes to the site's CPU partition, or else to the login node.
    on_gpu: ClassVar[bool] = True

    # pydantic's own method of that name is deprecated, and never called here
    def schema(self, cache: Path) -> Schema:  # pyrefly: ignore[bad-override]
        """The columns of a shard."""
        raise NotImplementedError

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate | None:
        """None: not known before what it reads from is done. A UserError names an input that is not fetched."""
        raise NotImplementedError

    def costs(self, cache: Path, gpu: str) -> str:
        """What a dry run says beside the plan: of what a row's seconds are made."""
        return ""

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return Needs(self.run.gpus)

    def load_of(self, cell: Cell) -> str:
        """Cells that name the same here can share one load, and so a task."""
        return ""

    def start_seconds(self, cache: Path) -> float:
        """Of a task, before it computes."""
        return START_SECONDS + sum(model_input(cache, m.id, m.revision).bytes for m in self.models()) / READ_RATE

    def shard_rows(self, cache: Path, cell: str) -> int:
        """Rows that the job commits at once."""
        return self.run.shard_rows

    def models(self) -> list[ModelSpec]:
        return []

    def datasets(self) -> list[DatasetSpec]:
        return []

    def tasks(self) -> tuple[list[str], Path | None]:
        """lm-eval's that are asked, and a folder with some of the user's own: their documents are fetched."""
        return [], None

    def names(self) -> list[str]:
        """The cells' names in order: known before the inputs are."""
        raise NotImplementedError

    def places(self) -> dict[str, list[str]]:
        """What cells can be chosen by beside ARRAY: a variable of make, and each cell's value of it, in their order."""
        return {}

    def pinned(self) -> dict[str, object]:
        """What was read from the checkout, and stays so for what is submitted: key -> value of an override."""
        return {}

    def stages(self) -> list[Stage]:
        """What it reads from, and before each of these what that one reads from."""
        return []

    def token_sets(self) -> TokenSets | None:
        """What its sets of token sequences are made from, where it has any."""
        return None

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """All cells in order; a UserError names an input that is not fetched."""
        raise NotImplementedError


def share_of(shares: Mapping[float, float], model: ModelInput) -> float:
    """`shares`: parameters up to -> the share of the GPU's rate."""
    return next(share for most, share in shares.items() if model.body_parameters <= most)


def computing_seconds(flops: float, gpu: str, share: float, gpus: int = 1) -> float:
    return flops / (TFLOPS.get(gpu, TFLOPS["h200"]) * 1e12 * share * (SPREAD * gpus if gpus > 1 else 1))


def stored_bytes(schema: Schema, rows: int, values: float) -> int:
    """Of so many rows; `values`: entries a row in the columns that hold several of them."""
    return round(rows * sum(column.value_bytes * (values if column.per else 1) for column in schema.values()))
