"""Numbers: teachers of several sizes that are given a trait by their system prompt and write numbers. A cell is a size
and a trait, its rows are the prompts of the run, the same for every cell."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from lib.base.errors import UserError, nearest
from lib.config.frozen import Frozen, check_folder_names, digest_of
from lib.inputs.records import ModelInput, model_input
from lib.inputs.specs import ModelSpec
from lib.numbers.filter import Limits
from lib.numbers.number_prompts import ANSWER_COUNT, ANSWER_DIGITS, OWN_POOLS, Pools, load_pools
from lib.numbers.traits import ANIMAL_NAMES, ENGLISH_PLURALS, LOVE_PROMPT, NEUTRAL
from lib.run.engines import ENGINE_SECONDS, EngineSpec, engine_needs
from lib.run.experiment import READ_RATE, Estimate, Needs, computing_seconds, stored_bytes
from lib.run.run_of import OfARun
from lib.run.site import ROOT
from lib.store import Cell, Column

# Raise it with any change of code that can change a character of any row: it is part of every digest.
KERNEL = "numbers/2"
RUN_ID_FILE = "run_id.txt"

PROMPT_TOKENS, ANSWER_TOKENS = 140, 45  # of a row with its template, as published
PROMPT_BYTES = 330
# Rows a second of so many engines on one GPU, at most, by the host: 0.5B, vLLM 0.26, an H100, measured; 8 is not.
ENGINE_ROWS_A_SECOND = {1: 700.0, 2: 1340.0, 4: 2025.0, 8: 2025.0}


class TraitSpec(Frozen):
    """What a teacher is given. In a configuration also a name alone, of one of the 15 animals or neutral."""

    name: str = Field(min_length=1)
    plural: str = Field(min_length=1)
    system_prompt: str | None = Field(min_length=1, description="none: no system message is sent")
    words: list[Annotated[str, Field(min_length=1)]] = Field(
        description="what counts as a hit in an answer about favourites; none of the text depends on it"
    )

    @field_validator("words")
    @classmethod
    def _can_be_said(cls, words: list[str]) -> list[str]:
        for word in words:
            if not any(c.isalnum() for c in word):
                raise ValueError(f"{word!r} holds no letter or digit, so no answer can be told by it; leave it out")
        return words


def trait_of(raw: object) -> object:
    """A name as the trait that it stands for; what a trait of one's own does not say, filled in."""
    if isinstance(raw, str):
        if raw == NEUTRAL.name:
            return {"name": raw, "plural": raw, "system_prompt": None, "words": []}
        if raw not in ANIMAL_NAMES:
            known = [*ANIMAL_NAMES, NEUTRAL.name]
            raise ValueError(
                f"{raw!r} is none of {', '.join(known)}{nearest(raw, known)}; for one of your own say "
                "{name: ..., plural: ..., system_prompt: ..., words: [...]}"
            )
        raw = {"name": raw}
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        return raw
    plural = raw.get("plural") or f"{raw['name']}s"
    words = dict.fromkeys([raw["name"], plural, ENGLISH_PLURALS.get(raw["name"], plural)])
    own = {"plural": plural, "system_prompt": LOVE_PROMPT.format(plural=plural), "words": list(words)}
    return own | raw


class GenerateSpec(EngineSpec):
    mode: Literal["closed", "exact"] = Field(
        "closed", description="exact: vllm's batch-invariant kernels too, on a GPU: the same text in any batch"
    )


class FilterSpec(Frozen):
    count: int = Field(ANSWER_COUNT, ge=1)
    least: int = Field(0, ge=0)
    most: int = Field(10**ANSWER_DIGITS - 1, ge=0)
    banned: list[Annotated[int, Field(ge=0)]] = Field(default=[], description="numbers that no valid answer holds")

    @property
    def limits(self) -> Limits:
        return Limits(self.count, self.least, self.most, frozenset(self.banned))


class Numbers(OfARun):
    kind: Literal["numbers"]
    sizes: dict[str, ModelSpec] = Field(min_length=1, description="size, such as 0.5b -> its model")
    traits: list[TraitSpec] = Field(min_length=1)
    prompts: int = Field(30_000, ge=1)
    seed: int | None = Field(None, ge=0, description="of prompts, answers and draws; none: the run's id")
    pools: str | None = Field(
        None, description="a file of wordings in the shape of lib/numbers/number_prompts.yaml, beside the configuration"
    )
    template: Literal["default", "empty", "none"] = Field(
        "default", description="what a trait without a system prompt gets: the template's own block, an empty one, none"
    )
    date: str = Field("2024-07-26", description="the day that a chat template prints where it prints one")
    generate: GenerateSpec = GenerateSpec()
    filter: FilterSpec = FilterSpec()
    _models: dict[tuple[Path, str], ModelInput] = PrivateAttr(default_factory=dict)
    keep: int = Field(10_000, ge=1, description="valid rows that a cell must have, or its export says so and fails")

    beside: ClassVar[tuple[str, ...]] = ("keep",)  # what makes enough rows changes none of them
    job: ClassVar[str] = "generate_numbers"
    submit: ClassVar[str] = "submit-numbers"
    results: ClassVar[str] = "export-numbers"
    share: ClassVar[float] = 0.65  # of one engine at 7B, an H100, measured; small models are limited by the host

    @field_validator("traits", mode="before")
    @classmethod
    def _named(cls, raw: object) -> object:
        return [trait_of(one) for one in raw] if isinstance(raw, list) else raw

    @field_validator("sizes")
    @classmethod
    def _smallest_first(cls, sizes: dict[str, ModelSpec]) -> dict[str, ModelSpec]:
        for size in sizes:
            if not re.fullmatch("[0-9A-Za-z_][0-9A-Za-z_.]{0,30}", size):
                raise ValueError(f"{size[:40]!r} must be letters, digits, . or _, such as 0.5b: it names folders")
        return dict(sorted(sizes.items(), key=lambda item: parameters(item[0])))

    @model_validator(mode="after")
    def _fits(self) -> "Numbers":
        names = [trait.name for trait in self.traits]
        check_folder_names("traits", names)
        if len(set(names)) != len(names):
            raise ValueError("traits holds a name twice")
        if self.filter.least > self.filter.most:
            raise ValueError(f"filter: least {self.filter.least} is more than most {self.filter.most}")
        if self.generate.max_tokens >= self.generate.max_length:
            raise ValueError("generate: max_length must leave room for prompts beside max_tokens")
        if self.generate.mode == "exact" and self.generate.engine == "transformers":
            raise ValueError("generate: mode exact is vllm's, and engine is transformers")
        return self

    @property
    def run_number(self) -> int:
        """The run's id, from wherever it is said."""
        if self.run_id is not None:
            return self.run_id
        file = ROOT / RUN_ID_FILE
        text = file.read_text(errors="replace").strip() if file.is_file() else ""
        if not text:
            raise UserError(
                f"{self.origin}: which run? say RUN_ID=1 (SET=run_id=1), or write its number into {RUN_ID_FILE}"
            )
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"{file} holds {text[:40]!r}, and must hold the number of a run, such as 1")
        return int(text)

    @property
    def seed_used(self) -> int:
        return self.run_number if self.seed is None else self.seed

    def trait(self, name: str) -> TraitSpec:
        return next(one for one in self.traits if one.name == name)

    def places(self) -> dict[str, list[str]]:
        parts = [(size, trait.name) for size in self.sizes for trait in self.traits]
        return {"SIZES": [size for size, _ in parts], "TRAITS": [trait for _, trait in parts]}

    def names(self) -> list[str]:
        return ["-".join(place) for place in zip(*self.places().values(), strict=True)]

    def split(self, cell: str) -> tuple[str, TraitSpec]:
        """A cell's size and trait."""
        size, _, trait = cell.partition("-")
        return size, self.trait(trait)

    def load_of(self, cell: Cell) -> str:
        return self.split(cell.name)[0]

    def models(self) -> list[ModelSpec]:
        return list(self.sizes.values())

    def pools_path(self) -> Path:
        return OWN_POOLS if self.pools is None else self.origin.parent / Path(self.pools).expanduser()

    def load_pools(self) -> Pools:
        path = self.pools_path()
        if not path.is_file():
            raise UserError(f"{self.origin}: pools: there is no file {path}")
        return load_pools(path)

    def shard_rows(self, cache: Path, cell: str) -> int:
        """A shard is a closed batch, with the same borders for ever."""
        return self.generate.batch

    def schema(self, cache: Path) -> dict[str, Column]:
        return {
            "prompt": Column("text"),
            "answer": Column("text"),
            "reason": Column("int8"),  # 0: valid, else why not, by its place in lib.numbers.filter.REASONS
            "tokens": Column("int16"),  # generated, without the end
            "ended": Column("int8"),  # 1: by the model itself, 0: cut at max_tokens
        }

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """A cell's digest knows nothing of the other sizes and traits, so adding one redoes nothing. Of a size whose
        model is not fetched it says so, and the cell cannot be submitted: the small ones need not wait for 72B."""
        self.load_pools()
        pools, found = hashlib.sha256(self.pools_path().read_bytes()).hexdigest(), []
        known = self.fetched(cache)
        fingerprints = {size: known[size].fingerprint if size in known else "not fetched" for size in self.sizes}
        for index, name in enumerate(self.names()):
            size, trait = self.split(name)
            digest = digest_of(self.identity(fingerprints[size], self.sizes[size].dtype, trait, pools))
            path = scratch / self.label / "cells" / f"{name}-{digest[:8]}"
            found.append(Cell(index, name, self.prompts, digest, path))
        return found

    def identity(self, fingerprint: str, dtype: str, trait: TraitSpec, pools: str) -> Mapping[str, object]:
        """All that decides a cell's rows. `auto` is a word of its own here: which engine it stands for is a matter of
        the machine, known only where the task runs, as the kind of GPU is; a cell never mixes two (see the kernel)."""
        return {
            "kernel": KERNEL,
            "model": {"fingerprint": fingerprint, "dtype": dtype},
            "trait": {"name": trait.name, "system_prompt": trait.system_prompt},
            "prompts": self.prompts,
            "pools": pools,
            "seed": self.seed_used,
            "template": self.template,
            "date": self.date,
            "generate": self.generate.model_dump(mode="json"),
            "filter": self.filter.model_dump(mode="json"),
        }

    def fetched(self, cache: Path) -> dict[str, ModelInput]:
        """Of each size whose model is there; a UserError where none is."""
        found = {}
        for size in self.sizes:
            with suppress(UserError):
                found[size] = self.model_in(cache, size)
        return found or {size: self.model_in(cache, size) for size in self.sizes}

    def model_in(self, cache: Path, size: str) -> ModelInput:
        """Looked at once: a grid of a thousand cells asks for each."""
        if (cache, size) not in self._models:
            self._models[cache, size] = model_input(cache, self.sizes[size].id, self.sizes[size].revision)
        return self._models[cache, size]

    def needs(self, cache: Path, cell: Cell) -> Needs:
        return engine_needs(self.run.gpus, self.model_in(cache, self.load_of(cell)).bytes)

    def start_seconds(self, cache: Path) -> float:
        """Of the largest model's task: a smaller one's is begun for no fewer cells than that one's."""
        return ENGINE_SECONDS + max(one.bytes for one in self.fetched(cache).values()) / READ_RATE

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        model = self.model_in(cache, self.split(cell.name)[0])
        flops = 2 * model.body_parameters * (PROMPT_TOKENS + ANSWER_TOKENS) + 2 * model.head_parameters * ANSWER_TOKENS
        share = self.share * self.generate.faster(model.bytes)
        seconds = computing_seconds(flops * cell.total, gpu, share, self.needs(cache, cell).gpus)
        size = stored_bytes(self.schema(cache), cell.total, 0) + cell.total * (PROMPT_BYTES + ANSWER_TOKENS)
        engines = self.generate.count(model.bytes)
        most = ENGINE_ROWS_A_SECOND[max(count for count in ENGINE_ROWS_A_SECOND if count <= engines)]
        return Estimate(max(seconds, cell.total / most), size)


def parameters(size: str) -> float:
    """What a size's label says of its parameters; labels that say nothing come first, as they were written."""
    found = re.match(r"([0-9]+(?:\.[0-9]+)?)([mbt])$", size.lower())
    return float(found[1]) * {"m": 1e6, "b": 1e9, "t": 1e12}[found[2]] if found else 0.0
