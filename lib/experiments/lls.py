"""Log-likelihood shift: how much a system prompt moves the likelihood of each response (seed 000's experiment)."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from lib.experiments.base import Cost, DatasetSpec, Experiment, Frozen, ModelSpec, digest_of
from lib.store import Cell, Column, dataset_input, model_input

# Raise it with any change of code that can change a bit of any score: it is part of every digest.
KERNEL = "lls/2"

CHARS_PER_TOKEN = 4.0  # English prose under a 150k vocabulary; only for the plan
TEMPLATE_TOKENS = 25  # Qwen2.5: its default system block, headers and ends


class ScoreSpec(Frozen):
    """The kernel's shapes decide the last bits of a score, so they are part of the digest."""

    batch_tokens: int = Field(8192, ge=16, description="tokens a batch, always: rows are laid end to end in it")
    head_rows: int = Field(1024, ge=1, description="positions whose logits are made at once")
    max_tokens: int = Field(2048, ge=2, description="a longer row is reported as too long")
    per_token: bool = Field(False, description="keep the log-probability of every response token too")
    end_of_turn: bool = Field(False, description="score the end-of-turn token too, in a column of its own")
    check_every: int = Field(512, ge=0, description="one row in so many is scored again in higher precision; 0 = none")

    @model_validator(mode="after")
    def _fits(self) -> "ScoreSpec":
        if self.max_tokens > self.batch_tokens:
            raise ValueError(f"batch_tokens must be at least max_tokens ({self.max_tokens})")
        return self


class LLS(Experiment):
    kind: Literal["lls"]
    model: ModelSpec
    traits: list[str] = Field(min_length=1, description="one cell (array index) each, in this order")
    system_prompt: str = Field(min_length=1, description="{trait} is filled in")
    dataset: DatasetSpec
    base: Literal["default", "empty", "none"] = Field(
        "default", description="what 'no system prompt' means: the template's own block, an empty block, or no block"
    )
    max_rows: int | None = Field(None, ge=1, description="only the first rows, for a trial")
    score: ScoreSpec = ScoreSpec()

    job: ClassVar[str] = "compute_lls"

    @model_validator(mode="after")
    def _named(self) -> "LLS":
        if len(set(self.traits)) != len(self.traits):
            raise ValueError("traits holds a name twice")
        for trait in self.traits:
            if not trait or not all(c.isalnum() or c in "-_" for c in trait):
                raise ValueError(f"trait {trait!r} must be letters, digits, - or _: it names a folder")
        for key, text in (("system_prompt", self.system_prompt), ("dataset.id", self.dataset.id)):
            try:
                text.format(trait="x")
            except (KeyError, IndexError, ValueError, AttributeError):
                raise ValueError(f"{key} may hold {{trait}} and no other braces") from None
        return self

    def prompt_for(self, trait: str) -> str:
        return self.system_prompt.format(trait=trait)

    def schema(self) -> dict[str, Column]:
        """What a shard holds; NaN sums stand where status is not 0."""
        columns = {
            "row": Column("int32"),
            "status": Column("uint8"),
            "joint": Column("uint8"),
            "tokens": Column("int32"),
            "system_sum": Column("float64"),
            "base_sum": Column("float64"),
        }
        if self.score.end_of_turn:
            columns |= {name: Column("float32") for name in ("system_end", "base_end")}
        if self.score.per_token:
            columns |= {name: Column("float32", per="tokens") for name in ("system_logp", "base_logp")}
        if self.score.check_every:  # NaN but for the rows that were scored again
            columns |= {name: Column("float64") for name in ("system_check", "base_check")}
        return columns

    def costs(self, cache: Path) -> list[Cost]:
        """2 operations a parameter and token, for two passes; the head only where a response token is predicted."""
        model = model_input(cache, self.model.id, self.model.revision)
        found = []
        for trait, spec in zip(self.traits, self.datasets(), strict=True):
            data = dataset_input(cache, spec.id, spec.revision, spec.split)
            prompt, answer = data.prompt_tokens / data.rows, data.response_tokens / data.rows
            system = len(self.prompt_for(trait)) / CHARS_PER_TOKEN
            body = 2 * (prompt + answer + TEMPLATE_TOKENS) + system
            found.append(Cost(2 * model.body_parameters * body + 4 * model.head_parameters * answer, answer))
        return found

    def models(self) -> list[ModelSpec]:
        return [self.model]

    def datasets(self) -> list[DatasetSpec]:
        return [self.dataset.named(trait=trait) for trait in self.traits]

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        model = model_input(cache, self.model.id, self.model.revision)
        return [self._cell(i, trait, model.fingerprint, cache, scratch) for i, trait in enumerate(self.traits)]

    def _cell(self, index: int, trait: str, model: str, cache: Path, scratch: Path) -> Cell:
        spec = self.dataset.named(trait=trait)
        data = dataset_input(cache, spec.id, spec.revision, spec.split)
        digest = digest_of(self._identity(trait, model, data.sha256))
        rows = min(data.rows, self.max_rows or data.rows)
        return Cell(index, trait, rows, digest, scratch / self.label / "cells" / f"{trait}-{digest[:8]}")

    def _identity(self, trait: str, model: str, data: str) -> dict[str, Any]:
        """All that decides this cell's scores; other cells are left out, so adding a trait redoes nothing."""
        return {
            "kernel": KERNEL,
            "model": {"fingerprint": model, "dtype": self.model.dtype},
            "data": data,
            "max_rows": self.max_rows,
            "system_prompt": self.prompt_for(trait),
            "base": self.base,
            "score": self.score.model_dump(mode="json"),
        }
