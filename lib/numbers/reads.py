"""What experiments share that read a run's numbers: which run it is, and the models of its sizes."""

from functools import cached_property
from pathlib import Path

from pydantic import Field

from lib.config.loading import load
from lib.inputs.specs import ModelSpec
from lib.numbers.experiment import Numbers
from lib.run.experiment import READ_RATE, START_SECONDS, Experiment, Reads, Stage
from lib.store import Cell


class ReadsNumbers(Experiment):
    """Its cells' names begin with a size of the numbers."""

    numbers: Reads
    run_id: int | None = Field(None, ge=0, description="which run of the experiment; none: as for the numbers")

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
    def label(self) -> str:
        """Runs never share a path."""
        return f"{super().label}_run{self.run_number}"

    def science(self) -> dict[str, object]:
        """A run is told by its label, and by the seed that it gives."""
        return {key: value for key, value in super().science().items() if key != "run_id"}

    def pinned(self) -> dict[str, object]:
        return {"run_id": self.run_number}

    def load_of(self, cell: Cell) -> str:
        return cell.name.partition("-")[0]

    def models(self) -> list[ModelSpec]:
        return self.source.models()

    def model_of(self, cell: Cell) -> ModelSpec:
        return self.source.sizes[self.load_of(cell)]

    def start_seconds(self, cache: Path) -> float:
        """Of the largest size."""
        return START_SECONDS + max(one.bytes for one in self.source.fetched(cache).values()) / READ_RATE
