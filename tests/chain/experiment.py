"""Three stages for the tests, a cell a trait in each: texts that are drawn, steps over them, rows about the steps.
tests/test_chain.py puts it into a copy of the repository, as lib/chain."""

from pathlib import Path
from typing import ClassVar, Literal

from lib.config.frozen import digest_of
from lib.run.experiment import Estimate, Experiment
from lib.run.extent import extent
from lib.store import Cell, Column
from lib.store.columns import Schema


class Stage(Experiment):
    traits: list[str]
    rows: int = 12

    job: ClassVar[str] = "run_chain"
    share: ClassVar[float] = 1.0

    def names(self) -> list[str]:
        return self.traits

    def places(self) -> dict[str, list[str]]:
        """Where traits are called size-trait."""
        sized = [trait.partition("-") for trait in self.traits if "-" in trait]
        if len(sized) < len(self.traits):
            return {}
        return {"SIZES": [size for size, _, _ in sized], "TRAITS": [trait for _, _, trait in sized]}

    def parents(self, cache: Path, scratch: Path) -> list[Cell]:
        return []

    def rows_of(self, parent: Cell | None) -> int | None:
        return self.rows

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        parents, found = {cell.name: cell for cell in self.parents(cache, scratch)}, []
        for index, trait in enumerate(self.traits):
            parent = parents.get(trait)
            mine = {"kind": str(self.kind), "trait": trait, "rows": self.rows}
            digest = digest_of(mine | {"parent": parent.digest if parent else ""})
            path = scratch / self.label / "cells" / f"{trait}-{digest[:8]}"
            found.append(Cell(index, trait, self.rows_of(parent), digest, path, (parent,) if parent else ()))
        return found

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        return Estimate(self.rows * 0.1, self.rows * 10)

    def start_seconds(self, cache: Path) -> float:
        return 1.0

    def before(self, kind: "type[Stage]") -> "Stage":
        """The stage that this one reads from: the same traits, under that stage's name."""
        name = kind.__name__.lower()
        return kind.model_validate({"kind": name, "name": name, "traits": self.traits, "rows": self.rows})


class Write(Stage):
    kind: Literal["write"]

    def schema(self, cache: Path) -> Schema:
        return {"text": Column("text")}


class Teach(Stage):
    kind: Literal["teach"]

    def parents(self, cache: Path, scratch: Path) -> list[Cell]:
        return self.before(Write).cells(cache, scratch)

    def rows_of(self, parent: Cell | None) -> int | None:
        return _known(parent)

    def schema(self, cache: Path) -> Schema:
        return {}


class Judge(Stage):
    kind: Literal["judge"]

    on_gpu: ClassVar[bool] = False
    job: ClassVar[str] = "run_judge"

    def parents(self, cache: Path, scratch: Path) -> list[Cell]:
        return self.before(Teach).cells(cache, scratch)

    def rows_of(self, parent: Cell | None) -> int | None:
        return _known(parent)

    def schema(self, cache: Path) -> Schema:
        return {"x": Column("float64")}


class Count(Stage):
    """Reads from nothing, and its rows are the same whoever makes them."""

    kind: Literal["count"]
    rows: int = 40

    def schema(self, cache: Path) -> Schema:
        return {"x": Column("float64")}


def _known(parent: Cell | None) -> int | None:
    """As many rows, or steps, as the parent has, once it is done."""
    assert parent
    found = extent(parent)
    return found.done if found.whole else None
