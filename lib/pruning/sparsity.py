"""Unstructured pruning: how well a model still predicts text when a share of its weights is zero: the paper's table.

A cell is `dense`, or a method on one seed's general text; a row is a pattern: which weights are compared with each
other, and how many of them go."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lib.attribution.experiment import Attribution
from lib.base.errors import UserError
from lib.config.frozen import digest_of
from lib.config.loading import load
from lib.inputs.records import model_input
from lib.inputs.samples import SamplesInput
from lib.inputs.specs import ModelSpec, TokenSets
from lib.pruning.looks import DENSE, Anchor, TextsSpec
from lib.run.experiment import Estimate, Experiment, Reads, Stage, computing_seconds
from lib.store import Cell, Column

# Raise it with any change of code that can change a bit of any result: it is part of every digest.
KERNEL = "sparsity/1"

Method = Literal["magnitude", "wanda", "sequential", "lrp"]
PATTERN = re.compile(r"(?:(row|layer|global):(0(?:\.\d+)?|1(?:\.0+)?)|(\d+):(\d+))")
SCORES_RATE = 1.0e9  # bytes/s of stored scores, from scratch


@dataclass(frozen=True)
class Way:
    """What a cell prunes by."""

    method: Method
    seed: int | None

    @property
    def name(self) -> str:
        return self.method if self.seed is None else f"{self.method}-{self.seed}"


class ExpectedSparse(Anchor):
    """A mean over seeds."""

    method: Method | None = Field(None, description="none: the dense model")
    pattern: str | None = None


class Sparsity(Experiment):
    kind: Literal["sparsity"]
    attribution: Reads
    layers: list[str] = Field(default=["all"], min_length=1, description="linear layers by name, or [all]")
    methods: list[Method] = Field(
        default=["magnitude", "wanda", "sequential", "lrp"],
        min_length=1,
        description="sequential: Wanda, each block calibrated on already pruned ones, as its authors do",
    )
    patterns: list[str] = Field(
        default=["row:0.5"], min_length=1, description="row:0.5, layer:0.5, global:0.5, or N of every M inputs, 2:4"
    )
    evaluate: TextsSpec = TextsSpec()
    expected: list[ExpectedSparse] = Field(default=[])

    job: ClassVar[str] = "prune_weights"
    results: ClassVar[str] = "sparsity-report"
    share: ClassVar[float] = 0.84

    @model_validator(mode="after")
    def _fits(self) -> "Sparsity":
        for name in ("methods", "patterns"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} holds one twice")
        for pattern in self.patterns:
            found = PATTERN.fullmatch(pattern)
            if not found or (found[3] and not 0 < int(found[3]) < int(found[4])):
                raise ValueError(f"patterns: {pattern!r} is none of row:0.5, layer:0.5, global:0.5, 2:4")
        for one in self.expected:
            if one.measure not in self.evaluate.labels or one.method not in (None, *self.methods):
                raise ValueError(f"expected: {one.measure!r} of {one.method} is not looked at")
            if one.pattern not in (self.patterns if one.method else [None]):
                raise ValueError(f"expected: {one.pattern!r} is none of the patterns")
        return self

    @cached_property
    def sources(self) -> Mapping[str, Stage]:
        """The attributions of every weight that its methods are read from."""
        layers = f"score.layers=[{', '.join(self.layers)}]"
        found = {}
        if "wanda" in self.methods:
            found["wanda"] = self._source(["score.level=weight", layers, "score.scores=[]", "score.wanda=true"])
        if "lrp" in self.methods:
            how = ["score.level=weight", layers, "score.scores=[signed]", "score.wanda=false"]
            found["lrp"] = self._source([*how, "score.batch_tokens=8192"])
        return found

    def _source(self, changes: list[str]) -> Stage:
        path, overrides = self.origin.parent / self.attribution.config, [*self.attribution.set, *changes]
        return Stage(path, tuple(overrides), load(path, overrides, {"attribution": Attribution}))

    @cached_property
    def base(self) -> Attribution:
        """Whose model and general text these are."""
        path = self.origin.parent / self.attribution.config
        return load(path, self.attribution.set, {"attribution": Attribution})

    def stages(self) -> list[Stage]:
        return list(self.sources.values())

    def tasks(self) -> tuple[list[str], Path | None]:
        return self.evaluate.tasks, self.evaluate.own_tasks

    def models(self) -> list[ModelSpec]:
        return [self.base.model]

    def token_sets(self) -> TokenSets:
        data = self.base.data
        found = data.model_copy(update={"text": self.evaluate.text}) if self.evaluate.text else data
        if self.evaluate.perplexity and found.text is None:
            raise UserError(f"{self.origin}: evaluate.perplexity needs a text: data.text of {self.base.name}")
        return found

    def science(self) -> dict[str, object]:
        return {key: value for key, value in super().science().items() if key != "expected"}

    def set_of(self, cache: Path, name: str) -> SamplesInput:
        return self.token_sets().prepared(cache, self.base.model, name)

    @cached_property
    def ways(self) -> dict[str, Way]:
        """By the cells' names."""
        found = []
        for method in self.methods:
            found += [Way(method, s) for s in ([None] if method == "magnitude" else self.base.data.general.seeds)]
        return {way.name: way for way in found}

    def names(self) -> list[str]:
        return [DENSE, *self.ways]

    def patterns_of(self, cell: str) -> list[str]:
        """The rows of a cell. Blocks that are pruned one after another cannot be ranked all together."""
        if cell == DENSE:
            return [""]
        sequential = self.ways[cell].method == "sequential"
        return [pattern for pattern in self.patterns if not (sequential and pattern.startswith("global"))]

    def shard_rows(self, cache: Path, cell: str) -> int:
        return 1

    def schema(self, cache: Path) -> dict[str, Column]:
        return {"zeros": Column("int64"), "weights": Column("int64"), **self.evaluate.columns()}

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        read = {
            name: {cell.name: cell for cell in stage.experiment.cells(cache, scratch)}
            for name, stage in self.sources.items()
        }
        sets = self.token_sets().sets()
        wanted = [name for name in ("text", "documents") if name in sets]
        model, found = model_input(cache, self.base.model.id, self.base.model.revision), []
        for index, name in enumerate(self.names()):
            way = self.ways.get(name)
            parents = (read[way.method][f"general-{way.seed}"],) if way and way.method in read else ()
            calibrated = f"general-{way.seed}" if way and way.method == "sequential" else None
            parts = {
                "kernel": KERNEL,
                "model": {"fingerprint": model.fingerprint, "dtype": self.base.model.dtype},
                "layers": self.layers,
                "method": way.method if way else None,
                "patterns": self.patterns_of(name),
                "sets": {n: self.set_of(cache, n).sha256 for n in [*wanted, *([calibrated] if calibrated else [])]},
                "evaluate": self.evaluate.identity(),
                "parents": [parent.digest for parent in parents],
            }
            digest, rows = digest_of(parts), len(self.patterns_of(name))
            found.append(
                Cell(index, name, rows, digest, scratch / self.label / "cells" / f"{name}-{digest[:8]}", parents)
            )
        return found

    def load_of(self, cell: Cell) -> str:
        return self.base.model.id

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """Perplexity, reading scores and the weights that are put back; sequential Wanda: two forward passes over the
        calibration text."""
        model = model_input(cache, self.base.model.id, self.base.model.revision)
        tokens = self.set_of(cache, "text").tokens * self.evaluate.passes() if self.evaluate.perplexity else 0
        way = self.ways.get(cell.name)
        if way and way.method == "sequential":
            tokens += 2 * self.set_of(cache, f"general-{way.seed}").tokens
        seconds = computing_seconds(
            2 * (model.body_parameters + model.head_parameters) * tokens, gpu, self.share, self.run.gpus
        )
        seconds += model.bytes / SCORES_RATE if way else 0
        seconds += 4 * model.body_parameters / SCORES_RATE if way and way.method == "lrp" else 0
        size = sum(column.value_bytes for column in self.schema(cache).values())
        return Estimate(seconds * cell.total, size * cell.total)
