"""Experiments that belong together: those that are named, and before each of them what it reads from."""

from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr

from lib.base.errors import UserError
from lib.inputs.specs import DatasetSpec, ModelSpec
from lib.run.command import Load
from lib.run.experiment import Experiment, Reads, Stage
from lib.store import Cell


class Pipeline(Experiment):
    """It has no cells: its stages have. Its label names its page, and the job that makes it."""

    kind: Literal["pipeline"]
    run_id: int | None = Field(None, ge=0, description="which run of the experiment; none: as for its stages")
    wanted: list[Reads] = Field(min_length=1, description="experiments; what they read from comes before them")
    _load: Load | None = PrivateAttr(None)

    results: ClassVar[str] = "report"
    submit: ClassVar[str] = "submit-subliminal"

    def opened(self, load: Load) -> "Pipeline":
        self._load = load
        return self

    @cached_property
    def _stages(self) -> list[Stage]:
        assert self._load
        found: dict[str, Stage] = {}
        for reads in self.wanted:
            path = self.origin.parent / reads.config
            said = [*reads.set, *([] if self.run_id is None else [f"run_id={self.run_id}"])]
            experiment = self._load(path, said)
            if isinstance(experiment, Pipeline):
                raise UserError(f"{self.origin}: wanted: {path} is a pipeline itself; name its experiments")
            pins = [f"{key}={value}" for key, value in experiment.pinned().items()]
            said += [pin for pin in pins if pin not in said]
            for stage in [*experiment.stages(), Stage(path, tuple(said), experiment)]:
                found.setdefault(stage.experiment.label, stage)
        return list(found.values())

    def stages(self) -> list[Stage]:
        return self._stages

    def pinned(self) -> dict[str, object]:
        found = [pins for stage in self.stages() if "run_id" in (pins := stage.experiment.pinned())]
        return {"run_id": found[-1]["run_id"]} if found else {}

    @property
    def label(self) -> str:
        run = self.pinned().get("run_id")
        return super().label if run is None else f"{super().label}_run{run}"

    def science(self) -> dict[str, object]:
        return {key: value for key, value in super().science().items() if key != "run_id"}

    def models(self) -> list[ModelSpec]:
        return [spec for stage in self.stages() for spec in stage.experiment.models()]

    def datasets(self) -> list[DatasetSpec]:
        return [spec for stage in self.stages() for spec in stage.experiment.datasets()]

    def names(self) -> list[str]:
        return []

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        return []
