"""What experiments share that read a run's numbers: which run it is, and the models of its sizes."""

from functools import cached_property
from pathlib import Path

from lib.inputs.specs import ModelSpec
from lib.numbers.experiment import Numbers
from lib.run.experiment import READ_RATE, START_SECONDS, Reads, Stage
from lib.run.run_of import OfARun
from lib.store import Cell


class ReadsNumbers(OfARun):
    """Its cells' names begin with a size of the numbers."""

    numbers: Reads

    @cached_property
    def source(self) -> Numbers:
        return self.read(self.numbers, {"numbers": Numbers})

    def stages(self) -> list[Stage]:
        return [*self.source.stages(), self.stage(self.numbers, self.source)]

    @property
    def run_number(self) -> int:
        return self.source.run_number

    def load_of(self, cell: Cell) -> str:
        return cell.name.partition("-")[0]

    def models(self) -> list[ModelSpec]:
        return self.source.models()

    def model_of(self, cell: Cell) -> ModelSpec:
        return self.source.sizes[self.load_of(cell)]

    def start_seconds(self, cache: Path) -> float:
        """Of the largest size."""
        return START_SECONDS + max(one.bytes for one in self.source.fetched(cache).values()) / READ_RATE
