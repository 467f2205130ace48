"""Log-likelihood shift: how much a system prompt moves the likelihood of each response.

LLS       the diagonal (seed 000): each trait's prompt on its own dataset, against no system prompt; a cell is a trait
LLSCross  any prompts on any datasets: a cell is a condition (one prompt, or none), so that what its rows have in common
          is computed once, and the pass without a system prompt serves every prompt

lib.lls.numbers has a third: of what the teachers of a run wrote."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from lib.config.frozen import Frozen, check_folder_names, digest_of, fill
from lib.inputs.records import DatasetInput, Messages, dataset_input, model_input, read_rows
from lib.inputs.specs import DatasetSpec, ModelSpec
from lib.run.experiment import Estimate, Experiment, computing_seconds, stored_bytes
from lib.store import Cell, Column

# Raise it with any change of code that can change a bit of any score: it is part of every digest.
KERNEL = "lls/4"
CHARS_PER_TOKEN = 4.0  # English prose under a 150k vocabulary; only for the plan
TEMPLATE_TOKENS = 8  # headers and ends around a context, after the prefix

S = TypeVar("S", bound="Fetched")


class ScoreSpec(Frozen):
    """The kernel's shapes decide the last bits of a score, so they are part of the digest."""

    batch_tokens: int = Field(8192, ge=16, description="tokens a batch, always: rows are laid end to end in it")
    head_rows: int = Field(1024, ge=1, description="positions whose logits are made at once")
    max_tokens: int = Field(2048, ge=2, description="a longer row is reported as too long")
    per_token: bool = Field(False, description="keep the log-probability of every response token too")
    end_of_turn: bool = Field(False, description="score the end-of-turn token too, in a column of its own")
    check_every: int = Field(1024, ge=0, description="one row in so many is scored again in higher precision; 0 = none")

    @model_validator(mode="after")
    def _fits(self) -> ScoreSpec:
        if self.max_tokens > self.batch_tokens:
            raise ValueError(f"batch_tokens must be at least max_tokens ({self.max_tokens})")
        return self

    def columns(self, conditions: Iterable[str]) -> dict[str, Column]:
        """What is stored of a row under each condition; NaN sums stand where status is not 0."""
        columns = {name: Column(kind) for name, kind in (("status", "uint8"), ("joint", "uint8"), ("tokens", "int32"))}
        for name in conditions:
            columns[f"{name}_sum"] = Column("float64")
            if self.end_of_turn:
                columns[f"{name}_end"] = Column("float32")
            if self.per_token:
                columns[f"{name}_logp"] = Column("float32", per="tokens")
            if self.check_every:  # NaN but for the rows that were scored again
                columns[f"{name}_check"] = Column("float64")
        return columns


class Scoring(Experiment):
    """What every experiment of this family is to its kernel."""

    score: ScoreSpec = ScoreSpec()

    job: ClassVar[str] = "compute_lls"
    share: ClassVar[float] = 0.75  # 0.78 from 7B up, 0.58 at 0.5B, measured on an H200 (README, Speed)

    @property
    def rendering(self) -> tuple[str, str]:
        """What 'no system prompt' means to the chat template, and the day that it prints."""
        raise NotImplementedError

    def model_of(self, cell: Cell) -> ModelSpec:
        raise NotImplementedError

    def conditions(self, cell: str) -> dict[str, str | None]:
        """Column prefix -> system prompt (None: no system prompt) of what a cell computes."""
        raise NotImplementedError

    def rows(self, cache: Path, cell: Cell) -> tuple[list[Messages], dict[str, np.ndarray]]:
        """A cell's rows in order, and columns that say where they come from."""
        raise NotImplementedError


class Fetched(Scoring):
    """What LLS and LLSCross share: one model, and datasets that are fetched."""

    model: ModelSpec
    system_prompt: str = Field(min_length=1, description="{trait} is filled in")
    system_prompts: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default={}, description="of traits with a prompt of their own, which is taken as it is"
    )
    dataset: DatasetSpec
    base: Literal["default", "empty", "none"] = Field(
        "default", description="what 'no system prompt' means: the template's own block, an empty block, or no block"
    )
    date: str = Field(
        "2024-07-26", description="the day that a chat template prints where it prints one; the default is Llama-3.1's"
    )
    max_rows: int | None = Field(None, ge=1, description="only the first rows of each dataset, for a trial")

    submit: ClassVar[str] = "submit-lls"
    results: ClassVar[str] = "lls-report"

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, value: object) -> str:
        """YAML reads a day without quotes as one."""
        text = value.isoformat() if type(value) is datetime.date else value
        try:
            if isinstance(text, str) and datetime.date.fromisoformat(text).isoformat() == text:
                return text
        except ValueError:
            pass
        raise ValueError("must be a day such as 2024-07-26")

    @model_validator(mode="after")
    def _braces(self) -> Fetched:
        for key, text in (("system_prompt", self.system_prompt), ("dataset.id", self.dataset.id)):
            try:
                fill(text, trait="x")
            except ValueError:
                raise ValueError(f"{key} may hold {{trait}} and no other braces") from None
        if unknown := set(self.system_prompts) - set(self.names()):
            raise ValueError(f"system_prompts names {', '.join(sorted(unknown))}, which no cell is for")
        return self

    @property
    def rendering(self) -> tuple[str, str]:
        return self.base, self.date

    def model_of(self, cell: Cell) -> ModelSpec:
        return self.model

    def prompt_for(self, trait: str) -> str:
        return self.system_prompts.get(trait) or fill(self.system_prompt, trait=trait)

    def models(self) -> list[ModelSpec]:
        return [self.model]

    def input_of(self, cache: Path, trait: str) -> DatasetInput:
        spec = self.dataset.named(trait=trait)
        return dataset_input(cache, spec.id, spec.revision, spec.split)

    def messages(self, cache: Path, trait: str) -> list[Messages]:
        return [row["messages"] for row in read_rows(cache, self.input_of(cache, trait), self.max_rows)]

    def length(self, data: DatasetInput) -> int:
        return min(data.rows, self.max_rows or data.rows)

    def identity(self, model: str, prompt: str | None, data: object) -> dict[str, object]:
        """All that decides a cell's scores."""
        return {
            "kernel": KERNEL,
            "model": {"fingerprint": model, "dtype": self.model.dtype},
            "data": data,
            "max_rows": self.max_rows,
            "system_prompt": prompt,
            "base": self.base,
            "date": self.date,
            "score": self.score.model_dump(mode="json"),
        }

    def fingerprint(self, cache: Path) -> str:
        return model_input(cache, self.model.id, self.model.revision).fingerprint

    def datasets_for(self, cell: str) -> list[str]:
        """The traits whose dataset a cell scores."""
        raise NotImplementedError

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """2 operations a parameter and token; the head only where a response token is predicted. Every context counted
        as if it were alone: of a matrix an upper bound."""
        model = model_input(cache, self.model.id, self.model.revision)
        found = [self.input_of(cache, trait) for trait in self.datasets_for(cell.name)]
        rows = sum(data.rows for data in found)
        prompt, answer = (sum(getattr(d, f"{k}_tokens") for d in found) / rows for k in ("prompt", "response"))
        tokens = prompt + answer + TEMPLATE_TOKENS
        flops = 2 * len(self.conditions(cell.name)) * (model.body_parameters * tokens + model.head_parameters * answer)
        size = stored_bytes(self.schema(cache), cell.total, answer)
        return Estimate(computing_seconds(flops * cell.total, gpu, self.share, self.run.gpus), size)


class LLS(Fetched):
    results: ClassVar[str] = "export-lls"

    kind: Literal["lls"]
    traits: list[str] = Field(min_length=1, description="one cell (array index) each, in this order")

    @model_validator(mode="after")
    def _names(self) -> LLS:
        return check_names(self, "traits", self.traits)

    def schema(self, cache: Path) -> dict[str, Column]:
        return {"row": Column("int32"), **self.score.columns(("system", "base"))}

    def conditions(self, cell: str) -> dict[str, str | None]:
        return {"system": self.prompt_for(cell), "base": None}

    def rows(self, cache: Path, cell: Cell) -> tuple[list[Messages], dict[str, np.ndarray]]:
        messages = self.messages(cache, cell.name)
        return messages, {"row": np.arange(len(messages), dtype=np.int32)}

    def names(self) -> list[str]:
        return self.traits

    def datasets(self) -> list[DatasetSpec]:
        return [self.dataset.named(trait=trait) for trait in self.traits]

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """A trait's digest knows nothing of the other traits, so adding one redoes nothing."""
        model, found = self.fingerprint(cache), []
        for index, trait in enumerate(self.traits):
            data = self.input_of(cache, trait)
            digest = digest_of(self.identity(model, self.prompt_for(trait), data.sha256))
            path = scratch / self.label / "cells" / f"{trait}-{digest[:8]}"
            found.append(Cell(index, trait, self.length(data), digest, path))
        return found

    def datasets_for(self, cell: str) -> list[str]:
        return [cell]


class LLSCross(Fetched):
    kind: Literal["lls_cross"]
    prompts: list[str] = Field(min_length=1, description="traits whose system_prompt is a condition")
    more_prompts: dict[str, str] = Field(default={}, description="further conditions: name -> system prompt")
    datasets_of: list[str] = Field(min_length=1, description="traits whose dataset is scored; neutral is one of them")

    @model_validator(mode="after")
    def _names(self) -> LLSCross:
        check_names(self, "prompts", [*self.prompts, *self.more_prompts, "base"])
        return check_names(self, "datasets_of", self.datasets_of)

    def all_prompts(self) -> dict[str, str]:
        return {name: self.prompt_for(name) for name in self.prompts} | self.more_prompts

    def names(self) -> list[str]:
        return ["base", *self.all_prompts()]

    def schema(self, cache: Path) -> dict[str, Column]:
        where = {"dataset": Column("uint8"), "row": Column("int32")}
        return {**where, **self.score.columns(("prompt",))}

    def conditions(self, cell: str) -> dict[str, str | None]:
        return {"prompt": self.all_prompts().get(cell)}

    def rows(self, cache: Path, cell: Cell) -> tuple[list[Messages], dict[str, np.ndarray]]:
        """Rows of all datasets, those with the same context one after another: the context is then computed once.

        The datasets of a run were generated from one list of prompts, so most contexts are in most of them."""
        groups: dict[str, list[tuple[int, int, Messages]]] = {}
        for number, trait in enumerate(self.datasets_of):
            for row, messages in enumerate(self.messages(cache, trait)):
                context = "\0".join(f"{m['role']}\0{m['content']}" for m in messages[:-1] if m["role"] != "system")
                groups.setdefault(context, []).append((number, row, messages))
        flat = [entry for group in groups.values() for entry in group]
        places = np.array([entry[:2] for entry in flat])
        columns = {"dataset": places[:, 0].astype(np.uint8), "row": places[:, 1].astype(np.int32)}
        return [entry[2] for entry in flat], columns

    def datasets(self) -> list[DatasetSpec]:
        return [self.dataset.named(trait=trait) for trait in self.datasets_of]

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        model, found = self.fingerprint(cache), []
        data = [self.input_of(cache, trait) for trait in self.datasets_of]
        hashes = dict(zip(self.datasets_of, (d.sha256 for d in data), strict=True))
        rows = sum(map(self.length, data))
        for index, name in enumerate(self.names()):
            digest = digest_of(self.identity(model, self.all_prompts().get(name), list(hashes.items())))
            found.append(Cell(index, name, rows, digest, scratch / self.label / "cells" / f"{name}-{digest[:8]}"))
        return found

    def datasets_for(self, cell: str) -> list[str]:
        return self.datasets_of


def check_names(experiment: S, key: str, names: list[str]) -> S:
    """Names of cells and datasets: they name folders."""
    if len(set(names)) != len(names):
        raise ValueError(f"{key} holds a name twice")
    check_folder_names(key, names)
    return experiment
