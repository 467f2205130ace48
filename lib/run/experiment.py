"""What every experiment is: a configuration, inputs by reference, cells, and what they cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from lib.config.frozen import Configuration, Frozen
from lib.inputs.specs import DatasetSpec, ModelSpec, TokenSets
from lib.store import Cell, Column


class RunSpec(Frozen):
    """How the work is cut and watched. Nothing here can change a result, so nothing here is in the digest."""

    shard_rows: int = Field(1024, ge=1, description="rows committed at once: what a kill can lose")
    log_seconds: float = Field(30.0, gt=0, description="one plain progress line this often in a log")
    gpus: int = Field(1, ge=0, description="GPUs a task uses, for the estimate and the GPU-hours")


@dataclass(frozen=True)
class Cost:
    """What a row of a cell takes, for the plan."""

    flops: float
    values: float  # entries of the columns that hold several values a row


class Experiment(Configuration):
    run: RunSpec = RunSpec()

    job: ClassVar[str]  # jobs/<job>.py and slurm/<job>.sbatch
    submit: ClassVar[str]  # make targets: to submit it, and to get its results
    results: ClassVar[str]
    share: ClassVar[float]  # of the GPU's matmul rate, what the job reaches; for the plan

    # pydantic's own method of that name is deprecated, and never called here
    def schema(self, cache: Path) -> dict[str, Column]:  # pyrefly: ignore[bad-override]
        """The columns of a shard."""
        raise NotImplementedError

    def costs(self, cache: Path) -> list[Cost]:
        """Arithmetic and values of a row, cell by cell; a UserError names an input that is not fetched."""
        raise NotImplementedError

    def shard_rows(self, cache: Path, cell: str) -> int:
        """Rows that the job commits at once."""
        return self.run.shard_rows

    def models(self) -> list[ModelSpec]:
        raise NotImplementedError

    def datasets(self) -> list[DatasetSpec]:
        raise NotImplementedError

    def names(self) -> list[str]:
        """The cells' names in array order: known before the inputs are."""
        raise NotImplementedError

    def token_sets(self) -> TokenSets | None:
        """What its sets of token sequences are made from, where it has any."""
        return None

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """All cells in array order; a UserError names an input that is not fetched."""
        raise NotImplementedError
