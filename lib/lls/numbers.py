"""LLS of a run's numbers: what a trait's system prompt does to the likelihood of what its teacher wrote under it.

A cell is a size and a trait, read from the numbers' cell of that name; its rows are the valid answers, in their order.
A trait without a prompt of its own has no shift, and no cell."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import h5py
import numpy as np
from pydantic import Field

from lib.base.errors import UserError
from lib.config.frozen import digest_of
from lib.inputs.records import Messages
from lib.lls.experiment import KERNEL, Scoring
from lib.numbers.dataset import valid_rows
from lib.numbers.experiment import ANSWER_TOKENS, PROMPT_TOKENS
from lib.numbers.reads import ReadsNumbers
from lib.run.experiment import Estimate, Needs, computing_seconds, stored_bytes
from lib.run.extent import extent, settled
from lib.store import Cell, Column, read_cell


class LLSNumbers(ReadsNumbers, Scoring):
    kind: Literal["lls_numbers"]
    base: Literal["default", "empty", "none"] | None = Field(
        None, description="what 'no system prompt' means; none said: what neutral numbers were written with"
    )

    results: ClassVar[str] = "export-lls"

    @property
    def rendering(self) -> tuple[str, str]:
        return self.source.template if self.base is None else self.base, self.source.date

    def places(self) -> dict[str, list[str]]:
        traits = [trait.name for trait in self.source.traits if trait.system_prompt]
        if not traits:
            raise UserError(f"{self.origin}: no trait of {self.source.name} has a system prompt to score by")
        parts = [(size, trait) for size in self.source.sizes for trait in traits]
        return {"SIZES": [size for size, _ in parts], "TRAITS": [trait for _, trait in parts]}

    def names(self) -> list[str]:
        return ["-".join(place) for place in zip(*self.places().values(), strict=True)]

    def schema(self, cache: Path) -> dict[str, Column]:
        """`row`: the row's number in the numbers' cell."""
        return {"row": Column("int32"), **self.score.columns(("system", "base"))}

    def conditions(self, cell: str) -> dict[str, str | None]:
        return {"system": self.source.split(cell)[1].system_prompt, "base": None}

    def rows(self, cache: Path, cell: Cell) -> tuple[list[Messages], dict[str, np.ndarray]]:
        [parent] = cell.parents
        read = read_cell(parent, self.source.schema(cache), ["prompt", "answer", "reason"])
        valid = valid_rows(read["reason"])
        messages: list[Messages] = [
            [{"role": "user", "content": read["prompt"][i]}, {"role": "assistant", "content": read["answer"][i]}]
            for i in valid
        ]
        return messages, {"row": np.array(valid, np.int32)}

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """The model and the prompt are in the parent's digest."""
        found, parents = [], {cell.name: cell for cell in self.source.cells(cache, scratch)}
        for index, name in enumerate(self.names()):
            parent = parents[name]
            digest = digest_of(self._identity(parent))
            path = scratch / self.label / "cells" / f"{name}-{digest[:8]}"
            found.append(settled(Cell(index, name, how_many_valid(parent), digest, path, (parent,))))
        return found

    def _identity(self, parent: Cell) -> dict[str, object]:
        base, date = self.rendering
        score = self.score.model_dump(mode="json")
        return {"kernel": KERNEL, "parent": parent.digest, "base": base, "date": date, "score": score}

    def needs(self, cache: Path, cell: Cell) -> Needs:
        """What the batch file asks for is enough for any size; one whose model is not fetched says so here."""
        self.source.model_in(cache, self.load_of(cell))
        return Needs(self.run.gpus)

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate | None:
        """2 operations a parameter and token; the head only where an answer's token is predicted."""
        model = self.source.model_in(cache, self.load_of(cell))
        if cell.rows is None:
            return None
        tokens = PROMPT_TOKENS + ANSWER_TOKENS
        flops = 2 * 2 * (model.body_parameters * tokens + model.head_parameters * ANSWER_TOKENS) * cell.rows
        size = stored_bytes(self.schema(cache), cell.rows, ANSWER_TOKENS)
        return Estimate(computing_seconds(flops, gpu, self.share, self.run.gpus), size)


def how_many_valid(parent: Cell) -> int | None:
    """Answers of a cell of numbers that passed the filter; None before it is done, and where none is to be found."""
    found = extent(parent)
    return sum(_valid_in(piece.data, piece.sha256) for piece, _ in found.pieces) or None if found.whole else None


@lru_cache(maxsize=4096)
def _valid_in(file: Path, sha256: str) -> int:
    """Of a shard, from its one column; whoever computes from it reads all of it, and says what is broken."""
    with suppress(OSError, KeyError, ValueError, RuntimeError), h5py.File(file, "r", locking=False) as f:
        return len(valid_rows(f["reason"][:]))
    return 0
