"""The parts that every experiment shares: frozen models, inputs by reference, cells and digests."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from lib.store import Cell, Column

Dtype = Literal["bfloat16", "float32", "float64"]


class Frozen(BaseModel):
    """Immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelSpec(Frozen):
    id: str = Field(min_length=1, description="Hub id, a local folder, or cache:<folder under the cache>")
    revision: str = Field("main", min_length=1, description="commit, tag or branch; what it resolved to is recorded")
    dtype: Dtype = "bfloat16"


class DatasetSpec(Frozen):
    id: str = Field(min_length=1, description="Hub id, a local .jsonl file, or cache:<file under the cache>")
    revision: str = Field("main", min_length=1)
    split: str = "train"

    def named(self, **names: str) -> "DatasetSpec":
        return self.model_copy(update={"id": self.id.format(**names)})


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


def digest_of(parts: dict[str, Any]) -> str:
    """sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Experiment(Frozen):
    kind: str
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)
    run: RunSpec = RunSpec()

    job: ClassVar[str]  # jobs/<job>.py and slurm/<job>.sbatch
    submit: ClassVar[str]  # make targets: to submit it, and to get its results
    results: ClassVar[str]
    share: ClassVar[float]  # of the GPU's matmul rate, what the job reaches; for the plan
    _label: str = PrivateAttr("")

    @property
    def label(self) -> str:
        """The name of its folders and jobs. Overrides that change results add a suffix: a trial never shares a path."""
        return self._label or self.name

    def science(self) -> dict[str, Any]:
        """The part of the configuration that can change a result."""
        return self.model_dump(mode="json", exclude={"name", "run"})

    def science_json(self) -> str:
        return json.dumps(self.science(), sort_keys=True)

    def schema(self, cache: Path) -> dict[str, Column]:
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

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """All cells in array order; a UserError names an input that is not fetched."""
        raise NotImplementedError
