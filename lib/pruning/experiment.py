"""A selection ranks neurons by attributions: what matters to a behaviour and not to general text comes first.

A cell is a method, of all general text or of one seed's, or a random draw; a row is a rank."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lib.attribution.experiment import Attribution, Part
from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES, last
from lib.config.frozen import digest_of
from lib.config.loading import load
from lib.inputs.records import model_input
from lib.inputs.specs import ModelSpec, TokenSets
from lib.pruning.methods import CONTRASTED, DRAWN, SOURCES, WORDS, Method, Ranking
from lib.run.experiment import Estimate, Experiment, Needs, Reads, Stage
from lib.store import Cell, Column

# Raise it with any change of code that can change a bit of any ranking: it is part of every digest.
KERNEL = "selection/1"


class Selection(Experiment):
    kind: Literal["selection"]
    attribution: Reads
    undesired: str = Field(description="the behaviour: a set of the attribution's prompts")
    methods: list[Method] = Field(default=[*WORDS], min_length=1)
    contrast: Literal["difference", "ratio", "set_difference"] = Field(
        "difference", description="of means on general text and on the behaviour: subtracted, divided, or set by set"
    )
    scope: Literal["global", "layer"] = Field("global", description="N of the whole model, or of each layer")
    neurons: int = Field(1244, ge=1, description="the longest selection: of the model, or of each layer")
    seeds: bool = Field(True, description="also a selection from each seed's general text alone")
    draws: int = Field(5, ge=1, description="of each random control")

    job: ClassVar[str] = "select_neurons"
    share: ClassVar[float] = 1.0
    on_gpu: ClassVar[bool] = False

    @model_validator(mode="after")
    def _fits(self) -> "Selection":
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("methods holds one twice")
        return self

    @cached_property
    def sources(self) -> Mapping[str, Stage]:
        """The attributions that its methods are read from."""
        path = self.origin.parent / self.attribution.config
        own = self._source(path, [])
        base = own.experiment
        assert isinstance(base, Attribution)
        self._check(base)
        found = {"own": own}
        wanted = {SOURCES[m] for m in self.methods if m in SOURCES}
        if "gradient" in wanted:
            found["gradient"] = self._source(
                path, ["score.rule=gradient", "score.scores=[signed]", "score.wanda=false"]
            )
        if "activation" in wanted:
            layers = ", ".join(after(name) for name in base.score.layers)
            changes = [f"score.layers=[{layers}]", "score.scores=[]", "score.wanda=true"]
            found["activation"] = self._source(path, changes)
        return found

    def _source(self, path: Path, changes: list[str]) -> Stage:
        overrides = [*self.attribution.set, *changes]
        return Stage(path, tuple(overrides), load(path, overrides, {"attribution": Attribution}))

    def _check(self, base: Attribution) -> None:
        if self.undesired not in base.data.prompts:
            have = ", ".join(base.data.prompts)
            raise UserError(f"{self.origin}: undesired: {self.undesired!r} is no behaviour of {base.name}: {have}")
        if base.score.level != "neuron":
            raise UserError(
                f"{self.origin}: {base.name} scores weights; a selection is of neurons (score.level=neuron)"
            )
        lacks = [
            m for m in self.methods if (m in ("lrp", "undesired", "matched") and "signed" not in base.score.scores)
        ]
        lacks += [m for m in self.methods if m == "absolute" and "abs" not in base.score.scores]
        lacks += [m for m in self.methods if m == "wanda" and not base.score.wanda]
        if lacks:
            raise UserError(
                f"{self.origin}: methods: {', '.join(lacks)} cannot be read from {base.name}, whose score has "
                f"scores {base.score.scores} and wanda {str(base.score.wanda).lower()}; change one of the two"
            )

    @property
    def base(self) -> Attribution:
        found = self.sources["own"].experiment
        assert isinstance(found, Attribution)
        return found

    def stages(self) -> list[Stage]:
        return list(self.sources.values()) if set(self.methods) & SOURCES.keys() else []

    def models(self) -> list[ModelSpec]:
        return self.base.models()

    def token_sets(self) -> TokenSets:
        return self.base.data

    @cached_property
    def rankings(self) -> dict[str, Ranking]:
        """By the cells' names."""
        found, seeds = [], self.base.data.general.seeds
        for method in self.methods:
            if method in DRAWN:
                found += [Ranking(method, draw=draw) for draw in range(self.draws)]
            else:
                found.append(Ranking(method))
                if method in CONTRASTED and self.seeds and len(seeds) > 1:
                    found += [Ranking(method, seed=seed) for seed in seeds]
        return {ranking.name: ranking for ranking in found}

    def names(self) -> list[str]:
        return list(self.rankings)

    def layout(self, cache: Path) -> list[Part]:
        """The layers whose neurons are ranked."""
        return self.base.layout(cache)

    def rows(self, cache: Path) -> int:
        parts = self.layout(cache)
        have = sum(p.outputs for p in parts) if self.scope == "global" else min(p.outputs for p in parts)
        if self.neurons > have:
            each = "" if self.scope == "global" else " in the smallest layer"
            raise UserError(f"{self.origin}: neurons: {self.neurons} of {have}{each} cannot be selected; lower it")
        return self.neurons * (1 if self.scope == "global" else len(parts))

    def shard_rows(self, cache: Path, cell: str) -> int:
        return self.rows(cache)

    def schema(self, cache: Path) -> dict[str, Column]:
        seeds = len(self.base.data.general.seeds)
        return {
            "layer": Column("int32"),  # of the ranked layers, in forward order
            "neuron": Column("int32"),  # of the layer's outputs
            "value": Column("float64"),  # ranked by, ascending
            "low": Column("float64"),  # 95 % interval of a difference over samples; NaN where there is none
            "high": Column("float64"),
            "general": Column("float64"),
            "undesired": Column("float64"),
            "ranks": Column("int32", shape=(seeds,)),  # from each seed's general text alone, from 0; -1: not ranked so
        }

    def parents_of(self, ranking: Ranking, cells: Mapping[str, Mapping[str, Cell]]) -> tuple[Cell, ...]:
        """`cells`: of each source, by name."""
        if ranking.method not in SOURCES:
            return ()
        found = cells[SOURCES[ranking.method]]
        # each method's ranks from single seeds are told, so every seed is read
        general = [] if ranking.method == "undesired" else [f"general-{s}" for s in self.base.data.general.seeds]
        return tuple(found[name] for name in [*general, self.undesired])

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        read = {
            name: {cell.name: cell for cell in stage.experiment.cells(cache, scratch)}
            for name, stage in self.sources.items()
        }
        model, rows, found = model_input(cache, self.base.model.id, self.base.model.revision), self.rows(cache), []
        layers = [part.name for part in self.layout(cache)]
        for index, (name, ranking) in enumerate(self.rankings.items()):
            parents = self.parents_of(ranking, read)
            parts = {
                "kernel": KERNEL,
                "model": model.fingerprint,
                "layers": layers,
                "ranking": [ranking.method, ranking.seed, ranking.draw],
                "contrast": self.contrast if ranking.method in (*CONTRASTED, "matched") else None,
                "scope": self.scope,
                "rows": rows,
                "parents": [parent.digest for parent in parents],
            }
            digest = digest_of(parts)
            path = scratch / self.label / "cells" / f"{name}-{digest[:8]}"
            found.append(Cell(index, name, rows, digest, path, parents))
        return found

    def needs(self, cache: Path, cell: Cell) -> Needs:
        """A set's columns are in memory twice when shards are put together, and piece by piece in float64."""
        widest = (
            max((parent.total for parent in cell.parents), default=0) * sum(p.outputs for p in self.layout(cache)) * 4
        )
        return Needs(0, 2 + math.ceil(2.5 * widest / 2**30))

    def start_seconds(self, cache: Path) -> float:
        return 3.0

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """Reading what is ranked, at 0.5 GB/s with its checks, and ordering it."""
        read = sum(parent.total * sum(p.outputs for p in self.layout(cache)) * 4 for parent in cell.parents)
        return Estimate(1.0 + read / 0.5e9, cell.total * (4 + 4 + 5 * 8 + 4 * len(self.base.data.general.seeds)))


def after(layer: str) -> str:
    """The linear layer whose input a neuron's activation is: down_proj of up_proj, fc2 of fc1."""
    for family in FAMILIES.values():
        names = family.linears
        if layer.rpartition(".")[2] in {last(name) for name in (names.gate, names.up) if name}:
            return layer.rpartition(".")[0] + ("." if "." in layer else "") + last(names.down)
    raise UserError(
        f"method activation contrasts what an MLP's neurons put out, and {layer!r} has none: take it from `methods`, "
        "or rank up_proj or fc1 (score.layers)"
    )
