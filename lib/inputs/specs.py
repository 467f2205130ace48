"""Inputs by reference, as configurations name them: models, chat rows, and sets of token sequences.

The sets, made once by `make fetch`: general text, prompts of a behaviour, a text for perplexity, whole
and by its pages."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.config.frozen import Frozen, check_folder_names, digest_of, fill
from lib.inputs.records import model_input
from lib.inputs.samples import SamplesInput, samples_input

# Raise it with any change of code that can change a token of any set: it is part of every set's digest.
RECIPE = "samples/2"
NO_CELLS = ("text", "documents")  # sets that perplexity is measured on, and nothing else


class ModelSpec(Frozen):
    id: str = Field(min_length=1, description="Hub id, a local folder, or cache:<folder under the cache>")
    revision: str = Field("main", min_length=1, description="commit, tag or branch; what it resolved to is recorded")
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"


class DatasetSpec(Frozen):
    """Chat rows."""

    id: str = Field(min_length=1, description="Hub id, a local .jsonl file, or cache:<file under the cache>")
    revision: str = Field("main", min_length=1)
    split: str = "train"

    def named(self, **names: str) -> "DatasetSpec":
        return self.model_copy(update={"id": fill(self.id, **names)})


class SourceSpec(Frozen):
    """A dataset of the Hub, or a local folder that load_dataset reads in the same way."""

    id: str = Field(min_length=1, description="Hub id, a local folder, or cache:<folder under the cache>")
    revision: str = Field("main", min_length=1)
    config: str | None = Field(None, description="the dataset's configuration, e.g. en of allenai/c4")
    split: str = "train"


class GeneralSpec(SourceSpec):
    """Documents of at least `tokens` tokens from a shuffled stream, cut to exactly that many; one set a seed."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    samples: int = Field(128, ge=1)
    tokens: int = Field(2048, ge=2)
    crop: Literal["start", "random"] = Field("start", description="which part of a longer document")
    buffer: int = Field(10_000, ge=1, description="documents that the stream's shuffle holds")


class PromptsSpec(SourceSpec):
    """Prompts that show, or lead to, a behaviour."""

    select: Literal["all", "prompt", "response"] = Field(
        "prompt", description="every prompt, by the prompt's own toxicity, or by that of the model's own response"
    )
    threshold: float = Field(0.9, ge=0, le=1, description="toxic enough, where select is not all")
    at_most: float = Field(1.0, ge=0, le=1, description="select=prompt: not more toxic, for prompts that are neutral")
    samples: int = Field(93, ge=1, description="the first so many that pass, in file order")
    max_tokens: int = Field(256, ge=2, description="a longer prompt is passed over, and counted")
    held_out: bool = Field(False, description="every second prompt is kept for evaluation, the others are attributed")
    candidates: int = Field(2000, ge=1, description="select=response: prompts that are answered, in file order")
    response_tokens: int = Field(50, ge=1, description="select=response: greedy tokens a prompt")
    scorer: ModelSpec = ModelSpec(id="unitary/toxic-bert", revision="main", dtype="float32")


class TextSpec(SourceSpec):
    """The whole text of a split, in one row of tokens: what perplexity is measured on."""

    split: str = "test"


class DocumentsSpec(SourceSpec):
    """The same by its pages, from title to title: what perplexity a word is measured on."""

    split: str = "test"


class TokenSets(Frozen):
    general: GeneralSpec
    prompts: dict[str, PromptsSpec] = Field(min_length=1, description="behaviour -> its prompts; a cell each")
    text: TextSpec | None = None
    documents: DocumentsSpec | None = Field(
        None, description="what is not said is as in `text`", exclude_if=lambda spec: spec is None
    )

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, raw: object) -> object:
        if not isinstance(raw, dict) or not all(isinstance(raw.get(key), dict) for key in NO_CELLS):
            return raw
        return raw | {"documents": raw["text"] | raw["documents"]}

    @model_validator(mode="after")
    def _names(self) -> "TokenSets":
        if len(set(self.general.seeds)) != len(self.general.seeds):
            raise ValueError("general.seeds holds a seed twice")
        check_folder_names("prompts", self.prompts)
        for name in self.prompts:
            if name in NO_CELLS or name.startswith("general-"):
                raise ValueError(f"prompts: {name!r} is the name of another set")
        return self

    def sets(self) -> dict[str, tuple[SourceSpec, int | None]]:
        """Name -> (what it is made from, seed), in the order of the cells; those of NO_CELLS come last."""
        found: dict[str, tuple[SourceSpec, int | None]] = {
            f"general-{seed}": (self.general, seed) for seed in self.general.seeds
        }
        found |= {name: (spec, None) for name, spec in self.prompts.items()}
        return found | {name: (spec, None) for name in NO_CELLS if (spec := getattr(self, name))}

    def scorers(self) -> list[ModelSpec]:
        """The classifiers that choose prompts by the model's responses."""
        found = [spec.scorer for spec in self.prompts.values() if spec.select == "response"]
        return list({(scorer.id, scorer.revision): scorer for scorer in found}.values())

    def identity(self, cache: Path, model: ModelSpec, name: str) -> dict[str, object]:
        """All that decides a set: how it is drawn, and by which tokenizer (and, by response, which model)."""
        spec, seed = self.sets()[name]
        parts = spec.model_dump(mode="json", exclude={"seeds"})
        if parts.get("held_out"):
            parts["apart"] = "by tokens"  # no prompt is there twice
        if parts.get("at_most") == 1.0:  # sets that were made before there was such a limit are the same
            del parts["at_most"]
        found: dict[str, object] = {"recipe": RECIPE, "set": parts, "seed": seed}
        found["model"] = model_input(cache, model.id, model.revision).fingerprint
        if isinstance(spec, DocumentsSpec):
            found["parts"] = "pages"  # of the same source as `text`, perhaps
        if isinstance(spec, PromptsSpec) and spec.select == "response":
            found["dtype"] = model.dtype  # it decides close calls between two tokens of a response
        return found

    def digest(self, cache: Path, model: ModelSpec, name: str) -> str:
        return digest_of(self.identity(cache, model, name))

    def prepared(self, cache: Path, model: ModelSpec, name: str) -> SamplesInput:
        """The record of a set; a UserError when it is not prepared."""
        return samples_input(cache, name, self.digest(cache, model, name), self.sets()[name][0].id)
