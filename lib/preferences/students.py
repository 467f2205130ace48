"""Experiments that ask students, or their untouched bases, something: what all of these have in common."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lib.base.errors import UserError
from lib.config.frozen import digest_of
from lib.inputs.specs import ModelSpec
from lib.lora.experiment import Finetune
from lib.numbers.experiment import TraitSpec
from lib.preferences.questions import OWN_QUESTIONS, load_questions
from lib.run.experiment import Reads, Stage
from lib.run.run_of import OfARun
from lib.store import Cell

BASE = "base"  # in place of a trait, and of what else tells students apart


@dataclass(frozen=True)
class Place:
    """What a cell is of."""

    size: str
    trait: str  # BASE: of no student
    more: tuple[str, ...]  # what else tells students apart
    student: str | None  # the cell's name among the students

    @property
    def name(self) -> str:
        return self.student or f"{self.size}-{BASE}"


class OfStudents(OfARun):
    """What both have in common."""

    students: Reads
    epochs: Literal["all", "last"] | list[Annotated[int, Field(ge=1)]] = Field(
        "all", description="whose adapters are asked: 1, 2 ..."
    )
    questions: str | None = Field(
        None, description="a file of questions in the shape of lib/preferences/questions.yaml, beside the configuration"
    )
    first_questions: int | None = Field(None, ge=1, description="only the first so many of them")
    template: Literal["default", "empty", "none"] | None = Field(
        None, description="what a question, which has no system prompt, gets; none said: as the students were trained"
    )

    kernel: ClassVar[str]

    @field_validator("epochs")
    @classmethod
    def _ordered(cls, epochs: str | list[int]) -> str | list[int]:
        if isinstance(epochs, list) and (not epochs or sorted(set(epochs)) != epochs):
            raise ValueError("must rise, without one twice, e.g. [1, 5, 10]")
        return epochs

    @cached_property
    def source(self) -> Finetune:
        return self.read(self.students, {"finetune": Finetune})

    def stages(self) -> list[Stage]:
        return [*self.source.stages(), self.stage(self.students, self.source)]

    @property
    def run_number(self) -> int:
        return self.source.run_number

    @property
    def template_used(self) -> str:
        return self.source.template_used if self.template is None else self.template

    @property
    def epochs_used(self) -> list[int]:
        last = self.source.epochs
        if isinstance(self.epochs, list):
            if self.epochs[-1] > last:
                raise UserError(f"{self.origin}: epochs: {self.epochs[-1]} is more than the students' {last}")
            return self.epochs
        return [last] if self.epochs == "last" else list(range(1, last + 1))

    @cached_property
    def questions_used(self) -> list[str]:
        path = OWN_QUESTIONS if self.questions is None else self.origin.parent / Path(self.questions).expanduser()
        if not path.is_file():
            raise UserError(f"{self.origin}: questions: there is no file {path}")
        found = load_questions(path)
        if self.first_questions and self.first_questions > len(found):
            raise UserError(f"{self.origin}: first_questions: {path} holds {len(found)}")
        return found[: self.first_questions]

    @property
    def judged(self) -> list[TraitSpec]:
        """The traits that an answer can speak of."""
        found = [trait for trait in self.source.source.traits if trait.words]
        if not found:
            raise UserError(
                f"{self.origin}: no trait of {self.source.source.name} has `words` that an answer could name it by: "
                "give one some"
            )
        return found

    @cached_property
    def grid(self) -> list[Place]:
        """A size's base before its students."""
        students = self.source.places()
        if BASE in students["TRAITS"]:
            raise UserError(f"{self.origin}: a trait cannot be called {BASE}: the untouched model is")
        of = [
            Place(size, trait, tuple(more), name)
            for name, size, trait, *more in zip(self.source.names(), *students.values(), strict=True)
        ]
        none = (BASE,) * (len(students) - 2)
        return [
            place
            for size in self.source.source.sizes
            for place in (Place(size, BASE, none, None), *(one for one in of if one.size == size))
        ]

    @property
    def grouped(self) -> dict[str, list[Place]]:
        """Students that are compared with each other, and their base before them: of a size, and by what else tells
        students apart."""
        bases = {place.size: place for place in self.grid if place.student is None}
        found: dict[str, list[Place]] = {}
        for place in (one for one in self.grid if one.student):
            found.setdefault("-".join((place.size, *place.more)), [bases[place.size]]).append(place)
        return found

    def place(self, name: str) -> Place:
        return next(place for place in self.grid if place.name == name)

    def places(self) -> dict[str, list[str]]:
        columns = zip(*((place.size, place.trait, *place.more) for place in self.grid), strict=True)
        return dict(zip(self.source.places(), map(list, columns), strict=True))

    def names(self) -> list[str]:
        return [place.name for place in self.grid]

    def load_of(self, cell: Cell) -> str:
        return self.place(cell.name).size

    def models(self) -> list[ModelSpec]:
        return self.source.models()

    def model_of(self, cell: Cell) -> ModelSpec:
        return self.source.source.sizes[self.load_of(cell)]

    @property
    def epoch_rows(self) -> int:
        """Rows of a cell that are of one epoch."""
        return len(self.questions_used)

    def epochs_of(self, name: str) -> list[int]:
        """The untouched model's is 0."""
        return self.epochs_used if self.place(name).student else [0]

    def recipe(self) -> dict[str, object]:
        """What decides a value beside the model and the questions."""
        raise NotImplementedError

    def parents(self, cache: Path, scratch: Path) -> dict[str, tuple[Cell, ...]]:
        """What each cell reads from, the student first."""
        students = {cell.name: cell for cell in self.source.cells(cache, scratch)}
        return {p.name: (students[p.student],) if p.student else () for p in self.grid}

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """A student's model is its teacher's, and so is in its parent's digest. Of a size whose model is not fetched
        the base says so, and cannot be submitted."""
        numbers, parents, found = self.source.source, self.parents(cache, scratch), list[Cell]()
        known = numbers.fetched(cache)
        questions = hashlib.sha256("\0".join(self.questions_used).encode()).hexdigest()
        for index, place in enumerate(self.grid):
            fingerprint = known[place.size].fingerprint if place.size in known else "not fetched"
            base = {"fingerprint": fingerprint, "dtype": numbers.sizes[place.size].dtype}
            identity = {
                "kernel": self.kernel,
                "model": parents[place.name][0].digest if place.student else base,
                "epochs": self.epochs_of(place.name),
                "questions": questions,
                "template": self.template_used,
                "date": numbers.date,
                **self.recipe(),
            }
            digest = digest_of(identity)
            rows = len(self.epochs_of(place.name)) * self.epoch_rows
            path = scratch / self.label / "cells" / f"{place.name}-{digest[:8]}"
            found.append(Cell(index, place.name, rows, digest, path, parents[place.name]))
        return found
