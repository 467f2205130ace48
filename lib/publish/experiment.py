"""Publishing: teachers' numbers and students' adapters as repositories of the Hub. A cell is a size and a trait, read
from the student of that name and its teacher; its rows are repositories."""

import os
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lib.base.errors import UserError
from lib.config.frozen import digest_of, fill
from lib.config.plain import parse_yaml
from lib.inputs.specs import ModelSpec
from lib.lora.experiment import Finetune, adapter_parameters
from lib.numbers.experiment import ANSWER_TOKENS, PROMPT_BYTES
from lib.preferences.experiment import Preferences
from lib.preferences.students import BASE
from lib.publish.ledger import DAY, NEW, ledger_of
from lib.publish.names import USER, Names, Type, repository
from lib.publish.plan import Plan
from lib.run.experiment import Estimate, Needs, Reads, RunSpec, Stage
from lib.run.extent import extent
from lib.run.run_of import OfARun
from lib.run.site import site
from lib.store import Cell, Column
from lib.store.columns import Schema

# Raise it with any change of code that changes what a repository holds: it is part of every digest.
KERNEL = "publish/1"
USER_ID = "HF_USER_ID"
# Of a new repository at most: looked at 3 times, made, its card checked, its files offered, a large one offered, put
# together and confirmed, the commit, the collection. Of a task: whose login it is, what agents are called, and its two
# collections, looked for, made or read, and looked for again.
CALLS, LOOKS = 11, 8
CALL_SECONDS, SENT_RATE = 0.5, 20e6  # of a call; bytes a second. Not measured
LINE_BYTES = 2 * (PROMPT_BYTES + 2 * ANSWER_TOKENS)  # an answer, in raw.jsonl and in filtered.jsonl, as published
ROW_BYTES = 400  # what is kept of a repository


class PublishRun(RunSpec):
    """How fast it goes. The Hub's own limits for a free user, as of 2026, are what is said here or a little more."""

    gpus: int = Field(0, ge=0, le=0)
    repos_a_day: int = Field(300, ge=1, description="new repositories in 24 hours, by all machines together")
    share: str = Field("1", description="of these that are made from this scratch: 1/3 where three machines publish")
    commits_an_hour: int = Field(120, ge=1)
    calls: int = Field(900, ge=10, description="requests in 5 minutes")
    wait_minutes: float = Field(70.0, ge=0, description="what is waited for; with longer to go, the task ends")

    @field_validator("share", mode="before")
    @classmethod
    def _part(cls, raw: object) -> object:
        try:
            part = Fraction(str(raw))
        except (ValueError, ZeroDivisionError):
            part = Fraction(0)
        if isinstance(raw, bool) or not 0 < part <= 1:
            raise ValueError("must be a part of 1, such as 1/3 or 0.5")
        return str(raw)

    @property
    def new_repositories(self) -> int:
        """A day, at least one."""
        return max(1, int(self.repos_a_day * Fraction(self.share)))


@dataclass(frozen=True)
class Item:
    """A repository of a cell."""

    what: Literal["dataset", "adapter", "epoch"]
    epoch: int = 0  # of an adapter; the last one's too

    @property
    def type(self) -> Type:
        return "dataset" if self.what == "dataset" else "model"


class Publish(OfARun):
    kind: Literal["publish"]
    students: Reads
    preferences: Reads | None = Field(None, description="what the students prefer, for their cards")
    user: str | None = Field(
        None, description=f"user or organisation that owns what is made; none: {USER_ID}, or else whose login it is"
    )
    private: bool = False
    license: str | None = Field(None, min_length=1, description="by the Hub's word, such as apache-2.0, in every card")
    what: list[Literal["datasets", "adapters"]] = Field(
        default=["datasets", "adapters"], min_length=1, description="the teachers' numbers, the students' last adapters"
    )
    epochs: Literal["last", "all"] = Field("last", description="all: every earlier epoch's adapter too")
    hub_names: Names = Field(Names(), description="patterns: {user}, {size}, {trait}, {part}, {run}, {epoch}")
    run: PublishRun = PublishRun()

    job: ClassVar[str] = "publish"
    beside: ClassVar[tuple[str, ...]] = ("user",)  # who it is, is in the cells' digests
    submit: ClassVar[str] = "submit-publish"
    share: ClassVar[float] = 1.0
    on_gpu: ClassVar[bool] = False

    @field_validator("user")
    @classmethod
    def _is_user(cls, user: str | None) -> str | None:
        if user is not None and not USER.fullmatch(user):
            raise ValueError("is no name of a user or an organisation of the Hub")
        return user

    @model_validator(mode="after")
    def _something(self) -> "Publish":
        if len(set(self.what)) != len(self.what):
            raise ValueError("what names one twice")
        if self.preferences and not self.adapters:
            raise ValueError("preferences are for the adapters' cards, and what has none")
        if self.epochs == "all" and not self.adapters:
            raise ValueError("epochs: all, and what has no adapters; say epochs: last")
        return self

    @property
    def numbers(self) -> bool:
        return "datasets" in self.what

    @property
    def adapters(self) -> bool:
        return "adapters" in self.what

    @cached_property
    def source(self) -> Finetune:
        return self.read(self.students, {"finetune": Finetune})

    @cached_property
    def asked(self) -> Preferences | None:
        if not self.preferences:
            return None
        found = self.read_of_it(self.preferences, {"preferences": Preferences})
        if found.source.label != self.source.label:
            raise UserError(
                f"{self.origin}: {found.origin} asks {found.source.label}, and {self.source.label} is published"
            )
        return found

    def stages(self) -> list[Stage]:
        found = [*self.source.stages(), self.stage(self.students, self.source)]
        if self.asked and self.preferences:
            own = self.stage(self.preferences, self.asked)
            known = {stage.experiment.label for stage in found}
            found += [one for one in [*self.asked.stages(), own] if one.experiment.label not in known]
        return found

    @property
    def run_number(self) -> int:
        return self.source.run_number

    @property
    def owner(self) -> str:
        """The user, where something says who that is; '': only the login knows."""
        said = self.user or os.environ.get(USER_ID, "").strip()
        if said and not USER.fullmatch(said):
            raise UserError(f"{USER_ID}={said[:40]} is no name of a user or an organisation of the Hub")
        return said

    def pinned(self) -> dict[str, object]:
        owner = self.owner
        plain = owner if not owner or parse_yaml(owner) == owner else f"'{owner}'"  # a user may be called 123
        return {**super().pinned(), **({"user": plain} if plain else {})}

    def names(self) -> list[str]:
        return self.source.names()

    def places(self) -> dict[str, list[str]]:
        return self.source.places()

    def load_of(self, cell: Cell) -> str:
        """Nothing is loaded; but a size that is done need not wait for a larger one."""
        return cell.name.partition("-")[0]

    def models(self) -> list[ModelSpec]:
        return self.source.models()

    def items(self) -> list[Item]:
        """The repositories of a cell, in the order of its rows."""
        last = self.source.epochs
        found = [Item("dataset")] if self.numbers else []
        if self.adapters:
            found.append(Item("adapter", last))
        return found + ([Item("epoch", epoch) for epoch in range(1, last)] if self.epochs == "all" else [])

    def repository(self, cell: str, item: Item, owner: str) -> str:
        size, trait, part = self.source.parts[self.source.names().index(cell)]
        values = {"user": owner, "size": size, "trait": trait, "run": str(self.run_number), "part": part or ""}
        return repository(getattr(self.hub_names, item.what), **values, epoch=str(item.epoch))

    def shard_rows(self, cache: Path, cell: str) -> int:
        """What is there once is noted at once."""
        return 1

    def schema(self, cache: Path) -> Schema:
        return {
            "repository": Column("text"),  # type:owner/name
            "commit": Column("text"),  # that holds the files below
            "outcome": Column("text"),  # new, changed, or as it was
            "files": Column("int32"),
            "bytes": Column("int64"),  # of all of them
            "sent": Column("int64"),  # of those that were not there
        }

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        found, items = [], self.items()
        self._tells_parts_apart()
        asked = {cell.name: cell for cell in self.asked.cells(cache, scratch)} if self.asked else {}
        for index, student in enumerate(self.source.cells(cache, scratch)):
            teacher = student.parents[0]
            for item in items:
                self.repository(student.name, item, self.owner or "user")
            parents = (*([teacher] if self.numbers else []), *([student] if self.adapters else []))
            parents += tuple(asked[name] for name in (student.name, self.base_of(student.name)) if name in asked)
            digest = digest_of(self._identity([parent.digest for parent in parents]))
            path = scratch / self.label / "cells" / f"{student.name}-{digest[:8]}"
            found.append(Cell(index, student.name, len(items), digest, path, parents))
        return found

    def base_of(self, cell: str) -> str:
        """The cell of the preferences that asks the untouched model of a cell's size."""
        return f"{cell.partition('-')[0]}-{BASE}"

    def _tells_parts_apart(self) -> None:
        """A trait has several students, of parts of its rows, and one dataset."""
        if not self.source.select:
            return
        names = self.hub_names
        if self.numbers or "{part}" not in names.adapter or "{part}" not in names.epoch:
            raise UserError(
                f"{self.origin}: {self.source.name} trains several students of a trait: say what: [adapters], and put "
                "{part} into hub_names.adapter and hub_names.epoch"
            )

    def _identity(self, parents: list[str]) -> dict[str, object]:
        """All that decides where things lie on the Hub and what they hold."""
        own = {key: getattr(self, key) for key in ("private", "license", "epochs")} | {"what": sorted(self.what)}
        own |= {"names": self.hub_names.model_dump(mode="json")}
        return {"kernel": KERNEL, "parents": parents, "run": self.run_number, "user": self.owner, **own}

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return Needs(0)

    def start_seconds(self, cache: Path) -> float:
        return 3.0

    def item_bytes(self, cache: Path, cell: str, item: Item) -> int:
        """About what a repository takes."""
        numbers = self.source.source
        if item.what == "dataset":
            return numbers.prompts * LINE_BYTES
        model = numbers.model_in(cache, self.source.parts[self.source.names().index(cell)][0])
        return 4 * adapter_parameters(Path(model.path), self.source.lora.rank)

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """As fast as it can be sent, or as commits are allowed."""
        items = self.items()
        sent = sum(self.item_bytes(cache, cell.name, item) for item in items)
        seconds = len(items) * max(CALLS * CALL_SECONDS, 3600 / self.run.commits_an_hour) + sent / SENT_RATE
        return Estimate(seconds, len(items) * ROW_BYTES)

    def costs(self, cache: Path, gpu: str) -> str:
        scratch = site().scratch
        return f"all cells, {self.plan(cache, scratch, self.cells(cache, scratch), self.owner).text()}"

    def plan(self, cache: Path, scratch: Path, cells: list[Cell], owner: str) -> Plan:
        """What is left to publish of these cells; on the Hub some of it may be as it should be."""
        left = [(cell, item) for cell in cells for item in self._left(cell)]
        sizes = [self.item_bytes(cache, cell.name, item) for cell, item in left]
        return Plan(
            ids=[self.repository(cell.name, item, owner or "USER") for cell, item in left],
            calls=CALLS * len(left) + LOOKS,
            bytes=sum(sizes),
            largest=max(sizes, default=0),
            spent=ledger_of(scratch, owner).spent(NEW, DAY) if owner else 0,
            run=self.run,
        )

    def _left(self, cell: Cell) -> list[Item]:
        items = self.items()
        return [items[row] for a, b in extent(cell).left or [] for row in range(a, b)]

    def collection(self, item: Item, owner: str) -> str:
        """The title of the one that a repository belongs to."""
        pattern = self.hub_names.datasets if item.what == "dataset" else self.hub_names.adapters
        return fill(pattern, user=owner, run=str(self.run_number))
