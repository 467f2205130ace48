"""A sweep: what a model does without the first 10, 30, 100 ... neurons of every ranking of a selection.

Its cells share one load of the dense model: neurons are zeroed, the model is looked at, and they are put back."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lib.base.errors import UserError
from lib.config.frozen import Frozen, check_folder_names, digest_of
from lib.config.loading import load
from lib.inputs.records import ModelInput, model_input
from lib.inputs.samples import SamplesInput
from lib.inputs.specs import ModelSpec, PromptsSpec, TokenSets
from lib.pruning.experiment import Selection
from lib.pruning.looks import DENSE, Anchor, TextsSpec
from lib.pruning.methods import Method
from lib.run.experiment import Estimate, Experiment, Reads, Stage, computing_seconds
from lib.store import Cell, Column

# Raise it with any change of code that can change a bit of any result: it is part of every digest.
KERNEL = "sweep/1"
# One decoding step of transformers' generate takes the host's launches, however many rows there are.
STEP_SECONDS_A_LAYER = 0.97e-3  # 31 ms of 32 layers, 250 rows, an H100, measured
JUDGED_A_SECOND = 1000.0  # completions, by one judge on a GPU


class CompletionsSpec(Frozen):
    per_prompt: int = Field(25, ge=1, description="completions of each; the same draws for every setting")
    tokens: int = Field(50, ge=1, description="new tokens at most")
    temperature: float = Field(0.7, ge=0, description="0: the likeliest, which is one completion a prompt")
    seed: int = Field(0, ge=0)
    batch: int = Field(256, ge=1, description="completions at once; part of the digest, as it can change a last bit")
    with_prompt: bool = Field(False, description="judge the prompt together with its completion")

    @model_validator(mode="after")
    def _fits(self) -> "CompletionsSpec":
        if self.temperature == 0 and self.per_prompt != 1:
            raise ValueError("temperature 0 draws nothing, so that per_prompt is 1")
        return self


class EvaluateSpec(TextsSpec):
    neutral: dict[str, PromptsSpec] = Field(default={}, description="prompts that should not be harmed")
    same_prompts: bool = Field(
        False, description="judge on the very prompts that were attributed, as the paper does; else on held-out ones"
    )
    effect: Literal["toxicity", "repetition"] = Field(
        "toxicity",
        description="what pruning should lower: by the first judge, or repeated tokens (1 - RUR)",
    )
    completions: CompletionsSpec = CompletionsSpec()
    judges: list[ModelSpec] = Field(
        default=[
            ModelSpec(id="unitary/toxic-bert", dtype="float32"),
            ModelSpec(id="unitary/unbiased-toxic-roberta", dtype="float32"),
        ],
        description="classifiers; the first one's word is the report's, the second says where they differ",
    )

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateSpec":
        if len(set(self.judge_names)) != len(self.judges):
            raise ValueError("judges holds one twice")
        if self.effect == "toxicity" and not self.judges:
            raise ValueError("judges are empty, and effect is toxicity: nobody would judge it")
        check_folder_names("neutral", self.neutral)
        return self

    @property
    def judge_names(self) -> list[str]:
        return [judge.id.rstrip("/").rpartition("/")[2] for judge in self.judges]


class Expected(Anchor):
    method: Method | None = Field(None, description="none: the dense model")
    neurons: int = Field(0, ge=0)


class Sweep(Experiment):
    kind: Literal["sweep"]
    selection: Reads
    sizes: list[Annotated[int, Field(ge=1)]] = Field(default=[10, 30, 100, 300, 1000, 1244], min_length=1)
    evaluate: EvaluateSpec = EvaluateSpec()
    expected: list[Expected] = Field(default=[])

    job: ClassVar[str] = "prune_and_evaluate"
    submit: ClassVar[str] = "submit-sparc3"
    results: ClassVar[str] = "sparc3-report"
    share: ClassVar[float] = 0.84

    @model_validator(mode="after")
    def _fits(self) -> "Sweep":
        if self.sizes != sorted(set(self.sizes)):
            raise ValueError(f"sizes must rise; got {self.sizes}")
        known = ["toxicity", *self.evaluate.labels]
        for one in self.expected:
            if one.measure not in known:
                raise ValueError(f"expected: measure {one.measure!r} is not looked at; these are: {', '.join(known)}")
            if (one.method is None) != (one.neurons == 0) or one.neurons not in (0, *self.sizes):
                raise ValueError(f"expected: {one.neurons} neurons by {one.method}: name a method and one of the sizes")
        return self

    @cached_property
    def choice(self) -> Selection:
        return self._stage.experiment  # type: ignore[return-value]

    @cached_property
    def _stage(self) -> Stage:
        path, overrides = self.origin.parent / self.selection.config, self.selection.set
        found = load(path, overrides, {"selection": Selection})
        if self.sizes[-1] > found.neurons:
            raise UserError(
                f"{self.origin}: sizes: {self.sizes[-1]} is more than the {found.neurons} neurons of {found.name}; "
                "raise `neurons` there"
            )
        return Stage(path, tuple(overrides), found)

    def stages(self) -> list[Stage]:
        return [*self.choice.stages(), self._stage]

    def tasks(self) -> tuple[list[str], Path | None]:
        return self.evaluate.tasks, self.evaluate.own_tasks

    def models(self) -> list[ModelSpec]:
        return [*self.choice.models(), *self.evaluate.judges]

    @property
    def model(self) -> ModelSpec:
        return self.choice.base.model

    def token_sets(self) -> TokenSets:
        """The attribution's, and what only the sweep looks at."""
        data = self.choice.base.data
        changes: dict[str, object] = {"prompts": {**data.prompts, **self.evaluate.neutral}}
        if twice := data.prompts.keys() & self.evaluate.neutral.keys():
            raise UserError(
                f"{self.origin}: evaluate.neutral: {min(twice)!r} is a behaviour of {self.choice.base.name}"
            )
        if self.evaluate.text:
            changes["text"] = self.evaluate.text
        found = data.model_copy(update=changes)
        if self.evaluate.perplexity and found.text is None:
            raise UserError(f"{self.origin}: evaluate.perplexity needs a text: data.text of {self.choice.base.name}")
        return found

    def science(self) -> dict[str, object]:
        """How results are shown is none of it."""
        found = {key: value for key, value in super().science().items() if key != "expected"}
        return found | {"evaluate": self.evaluate.model_dump(mode="json", exclude={"effect"})}

    def set_of(self, cache: Path, name: str) -> SamplesInput:
        return self.token_sets().prepared(cache, self.model, name)

    def judged(self) -> list[str]:
        """Sets of prompts that are completed: the behaviour's first."""
        return [self.choice.undesired, *self.evaluate.neutral]

    def prompts(self, cache: Path, name: str) -> int:
        """How many of a set are completed."""
        found = self.set_of(cache, name)
        if name != self.choice.undesired:
            return found.rows
        if self.evaluate.same_prompts:
            return found.attributed
        if found.rows == found.attributed:
            raise UserError(
                f"{self.origin}: no prompt of {name} is held out from attribution; set data.prompts.{name}.held_out in "
                f"{self.choice.base.name}, or evaluate.same_prompts here (the paper's way)"
            )
        return found.rows - found.attributed

    def names(self) -> list[str]:
        return [DENSE, *self.choice.names()]

    def rows_of(self, name: str) -> int:
        return 1 if name == DENSE else len(self.sizes)

    def shard_rows(self, cache: Path, cell: str) -> int:
        return 1

    def schema(self, cache: Path) -> dict[str, Column]:
        e, columns = self.evaluate, {"neurons": Column("int32"), **self.evaluate.columns()}
        for name in self.judged():
            shape = (self.prompts(cache, name), e.completions.per_prompt)
            columns |= {f"toxicity/{name}/{judge}": Column("float32", shape=shape) for judge in e.judge_names}
            columns[f"unique/{name}"] = Column("float32", shape=shape)  # share of a completion's tokens, RUR
            columns[f"tokens/{name}"] = Column("int32", shape=shape)
            columns[f"texts/{name}"] = Column("text")  # JSON: a list a prompt
        return columns

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        chosen = {cell.name: cell for cell in self.choice.cells(cache, scratch)}
        parts = self._identity(cache)
        found = []
        for index, name in enumerate(self.names()):
            parents = () if name == DENSE else (chosen[name],)
            sizes = [] if name == DENSE else self.sizes
            digest = digest_of(parts | {"sizes": sizes, "parents": [parent.digest for parent in parents]})
            path = scratch / self.label / "cells" / f"{name}-{digest[:8]}"
            found.append(Cell(index, name, self.rows_of(name), digest, path, parents))
        return found

    def _identity(self, cache: Path) -> dict[str, object]:
        """All that decides what is seen of a model, whichever its neurons."""
        sets = self.token_sets().sets()
        wanted = [*self.judged(), *(name for name in ("text", "documents") if name in sets)]
        e = self.evaluate
        return {
            "kernel": KERNEL,
            "model": {"fingerprint": self._model(cache).fingerprint, "dtype": self.model.dtype},
            "judges": [[model_input(cache, j.id, j.revision).fingerprint, j.dtype] for j in e.judges],
            "sets": {name: self.set_of(cache, name).sha256 for name in wanted},
            "evaluate": e.identity(),
        }

    def _model(self, cache: Path) -> ModelInput:
        return model_input(cache, self.model.id, self.model.revision)

    def load_of(self, cell: Cell) -> str:
        return self.model.id

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        perplexity, completing, judging = self.seconds(cache, gpu)
        size = sum(column.value_bytes for column in self.schema(cache).values())
        texts = sum(self.prompts(cache, n) for n in self.judged()) * self.evaluate.completions.per_prompt
        each = perplexity + completing + judging
        return Estimate(cell.total * each, cell.total * (size + texts * self.evaluate.completions.tokens * 4))

    def costs(self, cache: Path, gpu: str) -> str:
        perplexity, completing, judging = self.seconds(cache, gpu)
        return (
            f"a setting: {perplexity + completing + judging:.3g} s (perplexity {perplexity:.3g}, completions "
            f"{completing:.3g}, judges {judging:.3g}), {sum(map(self.rows_of, self.names()))} settings"
        )

    def seconds(self, cache: Path, gpu: str) -> tuple[float, float, float]:
        """Of one setting: perplexity, completions, judging."""
        found, e = self._model(cache), self.evaluate
        tokens = self.set_of(cache, "text").tokens if e.perplexity else 0
        forward = 2 * (found.body_parameters + found.head_parameters) * tokens * e.passes()
        texts = sum(self.prompts(cache, name) for name in self.judged()) * e.completions.per_prompt
        batches = sum(
            -(-self.prompts(cache, n) * e.completions.per_prompt // e.completions.batch) for n in self.judged()
        )
        weights = 2 * found.body_parameters / 3e12  # bytes that each step reads, at 3 TB/s
        step = max(STEP_SECONDS_A_LAYER * layers_of(found), weights) if gpu != "cpu" else 2 * weights * 3e12 / 0.08e12
        judging = texts * len(e.judges) / (JUDGED_A_SECOND if gpu != "cpu" else 20.0)
        return (
            computing_seconds(forward, gpu, self.share, self.run.gpus),
            batches * e.completions.tokens * step,
            judging,
        )


def layers_of(model: ModelInput) -> int:
    from lib.base.atomic import read_json

    found = (read_json(Path(model.path) / "config.json") or {}).get("num_hidden_layers")
    return found if isinstance(found, int) else 32
