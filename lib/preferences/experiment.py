"""What students prefer, asked for in two ways. A cell is a student with its epochs, or a size's untouched base.

Logprobs     log p(trait | question) of whole words, read directly from the model: computed, cheap, quiet
Preferences  answers drawn by an engine and judged; the first kind's probes prove that each adapter is live"""

import math
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from lib.base.errors import UserError
from lib.preferences.students import BASE, OfStudents
from lib.run.engines import ENGINE_SECONDS, EngineSpec, engine_needs
from lib.run.experiment import (
    READ_RATE,
    START_SECONDS,
    Estimate,
    Needs,
    Reads,
    Stage,
    computing_seconds,
    share_of,
    stored_bytes,
)
from lib.store import Cell, Column
from lib.store.columns import Schema

# Raise them with any change of code that can change a bit of any value: they are part of every digest.
LOGPROBS_KERNEL, ANSWERS_KERNEL = "preference_logprobs/3", "preferences/2"
# Parameters up to -> the share of the GPU's rate that one engine reaches: 7B on an H100, 72B on two H200s, measured.
# Small models are limited by the host.
SHARES = {4e10: 0.42, math.inf: 0.82}
CONTEXT_TOKENS, ANSWER_TOKENS = 25, 5  # of a question after the system block, and of what is said
WORD_TOKENS = 12  # computed of a trait at a question: its likely spellings; 10 in a run, 28 and 41 on random weights
# At 0.5B, which the host limits: vLLM 0.26, four engines with adapters, an H100, measured.
ENGINE_ANSWERS_A_SECOND = 2670.0
QUESTIONS_READ_A_SECOND = 250.0  # likewise: 190 to 450, measured


class Logprobs(OfStudents):
    kind: Literal["preference_logprobs"]
    batch_tokens: int = Field(4096, ge=64, description="tokens a batch at most; part of the digest")
    head_rows: int = Field(512, ge=1, description="positions whose logits are made at once")

    kernel: ClassVar[str] = LOGPROBS_KERNEL
    job: ClassVar[str] = "score_preferences"
    submit: ClassVar[str] = "submit-preferences"
    results: ClassVar[str] = "export-preferences"
    share: ClassVar[float] = 0.65  # 0.66 to 0.70 at 7B, an H100, measured

    def recipe(self) -> dict[str, object]:
        """The plurals are in the probes."""
        words = {trait.name: trait.words for trait in self.judged}
        plurals = [trait.plural for trait in self.judged]
        return {"words": words, "plurals": plurals, "batch_tokens": self.batch_tokens, "head_rows": self.head_rows}

    def schema(self, cache: Path) -> Schema:
        many = (len(self.judged),)
        return {
            "epoch": Column("int16"),
            "question": Column("int16"),
            "logp": Column("float32", shape=many),  # of each trait: all spellings of its words together, as whole words
            "skipped": Column("float32", shape=many),  # log of what spellings that were not computed could add at most
            "probe": Column("float32"),  # log-probability of an answer that is given
        }

    def shard_rows(self, cache: Path, cell: str) -> int:
        """An adapter's."""
        return self.epoch_rows

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return self.source.needs(cache, cell)

    def start_seconds(self, cache: Path) -> float:
        return START_SECONDS + max(one.bytes for one in self.source.source.fetched(cache).values()) / READ_RATE

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        model = self.source.source.model_in(cache, self.load_of(cell))
        words = WORD_TOKENS * len(self.judged)
        flops = 2 * (model.body_parameters * (2 * CONTEXT_TOKENS + words) + model.head_parameters * words)
        seconds = computing_seconds(flops * cell.total, gpu, self.share, self.needs(cache, cell).gpus)
        seconds = max(seconds, cell.total / QUESTIONS_READ_A_SECOND)
        return Estimate(seconds, stored_bytes(self.schema(cache), cell.total, 0))


class AnswerSpec(EngineSpec):
    adapters: Literal["served", "merged"] = Field(
        "served",
        description="served: beside the base's weights, computed with every token; merged: inside them, one adapter "
        "after another, which rounds them (a shard's probe_off says what that costs) and takes one GPU an engine",
    )
    max_tokens: int = Field(64, ge=1)
    batch: int = Field(
        50_000,
        ge=1,
        description="rows of a closed batch: ten epochs of 50 questions x 100, one adapter after another; also what "
        "a kill can lose",
    )


class Preferences(OfStudents):
    kind: Literal["preferences"]
    logprobs: Reads
    per_question: int = Field(100, ge=1, description="answers to each")
    seed: int | None = Field(None, ge=0, description="of the draws; none: the run's id")
    generate: AnswerSpec = AnswerSpec()

    kernel: ClassVar[str] = ANSWERS_KERNEL
    job: ClassVar[str] = "evaluate_preferences"
    submit: ClassVar[str] = "submit-preferences"
    results: ClassVar[str] = "export-preferences"

    @cached_property
    def probes(self) -> Logprobs:
        found = self.read(self.logprobs, {"preference_logprobs": Logprobs})
        for what, ours, theirs in (
            ("students", self.source.label, found.source.label),
            ("template", self.template_used, found.template_used),
            ("questions", self.questions_used, found.questions_used[: len(self.questions_used)]),
        ):
            if ours != theirs:
                raise UserError(f"{self.origin}: its {what} must be those of {found.origin}, whose probes it needs")
        if missing := set(self.epochs_used) - set(found.epochs_used):
            raise UserError(f"{found.origin}: epochs: it leaves out {sorted(missing)}, which {self.origin} asks")
        return found

    def stages(self) -> list[Stage]:
        return [*super().stages(), self.stage(self.logprobs, self.probes)]

    @property
    def seed_used(self) -> int:
        return self.run_number if self.seed is None else self.seed

    @property
    def epoch_rows(self) -> int:
        return len(self.questions_used) * self.per_question

    def recipe(self) -> dict[str, object]:
        return {
            "per_question": self.per_question,
            "seed": self.seed_used,
            "generate": self.generate.model_dump(mode="json"),
        }

    def parents(self, cache: Path, scratch: Path) -> dict[str, tuple[Cell, ...]]:
        """The probes decide no answer, so they are in no digest: they must only be there."""
        probes = {cell.name: cell for cell in self.probes.cells(cache, scratch)}
        students = super().parents(cache, scratch)
        needed = {p.name: dict.fromkeys((p.name, f"{p.size}-{BASE}")) for p in self.grid}
        return {name: (*students[name], *(probes[one] for one in needed[name])) for name in students}

    def schema(self, cache: Path) -> Schema:
        return {
            "epoch": Column("int16"),
            "question": Column("int16"),
            "number": Column("int32"),
            "answer": Column("text"),
            "tokens": Column("int16"),
            "ended": Column("int8"),  # 1: by the model itself, 0: cut at max_tokens
        }

    def shard_rows(self, cache: Path, cell: str) -> int:
        """A shard is a closed batch, with the same borders for ever."""
        return self.generate.batch

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return engine_needs(self.run.gpus, self.source.source.model_in(cache, self.load_of(cell)).bytes)

    def start_seconds(self, cache: Path) -> float:
        return ENGINE_SECONDS + max(one.bytes for one in self.source.source.fetched(cache).values()) / READ_RATE

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """A question's own tokens are computed once a batch, its last ones for every answer."""
        model = self.source.source.model_in(cache, self.load_of(cell))
        flops = 2 * (model.body_parameters * (16 + ANSWER_TOKENS) + model.head_parameters * ANSWER_TOKENS)
        share = share_of(SHARES, model) * self.generate.faster(model.bytes)
        seconds = computing_seconds(flops * cell.total, gpu, share, self.needs(cache, cell).gpus)
        size = stored_bytes(self.schema(cache), cell.total, 0) + cell.total * 4 * ANSWER_TOKENS
        return Estimate(max(seconds, cell.total / ENGINE_ANSWERS_A_SECOND), size)
