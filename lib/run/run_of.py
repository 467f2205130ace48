"""Experiments that are run several times, on other machines perhaps: which run one is, and what it reads of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import Field

from lib.config.loading import load
from lib.run.experiment import Experiment, Reads, Stage

E = TypeVar("E", bound=Experiment)


class OfARun(Experiment):
    run_id: int | None = Field(
        None, ge=0, description="which run of the experiment; none: what run_id.txt in the checkout says"
    )

    beside: ClassVar[tuple[str, ...]] = ()  # further keys that decide no result

    @property
    def run_number(self) -> int:
        """The run's id, from wherever it is said."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Runs never share a path."""
        return f"{super().label}_run{self.run_number}"

    def science(self) -> dict[str, object]:
        """A run is told by its label, and by what it is drawn from."""
        return {key: value for key, value in super().science().items() if key not in ("run_id", *self.beside)}

    def pinned(self) -> dict[str, object]:
        return {"run_id": self.run_number}

    def path_of(self, reads: Reads) -> Path:
        return self.origin.parent / reads.config

    def read(self, reads: Reads, kinds: Mapping[str, type[E]]) -> E:
        """What it reads from, of the same run."""
        said = [] if self.run_id is None else [f"run_id={self.run_id}"]
        return load(self.path_of(reads), [*reads.set, *said], kinds)

    def read_of_it(self, reads: Reads, kinds: Mapping[str, type[E]]) -> E:
        """Of the same run, whatever its configuration and ours say of runs."""
        return load(self.path_of(reads), [*reads.set, f"run_id={self.run_number}"], kinds)

    def stage(self, reads: Reads, experiment: Experiment) -> Stage:
        """Which run it is may stand in the checkout; it stays so for all that is submitted."""
        return Stage(self.path_of(reads), (*reads.set, f"run_id={self.run_number}"), experiment)
