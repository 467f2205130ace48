"""Attribution (SparC3): how much each neuron or weight contributes on general text and on a behaviour's prompts.

A cell is a set of samples: general text under each seed, then each behaviour. Level neuron: a row is a sample, so any
cut merges to the same bits. Level weight: a row is the sum over a block of samples, cut by the experiment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lib.checkpoint.families import NO_RULES, family_in
from lib.checkpoint.headers import folder_tensors
from lib.checkpoint.layers import choose, linear_weights, shared_inputs
from lib.config.frozen import Frozen, digest_of
from lib.inputs.records import model_input
from lib.inputs.samples import SamplesInput
from lib.inputs.specs import NO_CELLS, DatasetSpec, ModelSpec, TokenSets
from lib.run.experiment import Estimate, Experiment, computing_seconds, stored_bytes
from lib.store import Cell, Column

# Raise it with any change of code that can change a bit of any score: it is part of every digest.
KERNEL = "attribution/2"
WIDTH_STEP = 8  # a batch's rows are as long as the longest sample, rounded up to this


class AttributeSpec(Frozen):
    rule: Literal["attnlrp", "cp_lrp", "gradient"] = Field(
        "attnlrp", description="LRP's rules as lxt has them, or the plain gradient as a baseline"
    )
    level: Literal["neuron", "weight"] = "neuron"
    scores: list[Literal["signed", "abs"]] = Field(
        default=["signed", "abs"],
        description="signed relevance (paper), sum |W * gradient| (seed); none: Wanda only",
    )
    layers: list[str] = Field(default=["up_proj"], min_length=1, description="linear layers by name, or [all]")
    target: Literal["last", "all", "given"] = Field(
        "last", description="explained: the largest logit at the last position, at every one, or those of `tokens`"
    )
    tokens: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="target=given: token ids explained at the last position"
    )
    wanda: bool = Field(False, description="sums of squares of each layer's input, in the same pass")
    batch_tokens: int = Field(2048, ge=16, description="tokens a batch: short samples share one")
    block: int = Field(128, ge=1, description="level weight: samples added up in one row")
    store: Literal["float32", "bfloat16"] = Field("float32", description="level weight: how sums are stored")
    nonfinite: int = Field(0, ge=0, description="NaN and infinite scores of a shard that do not stop the run")

    @model_validator(mode="after")
    def _fits(self) -> "AttributeSpec":
        if not (self.scores or self.wanda):
            raise ValueError("scores are empty and wanda is false: nothing would be computed")
        if len(set(self.scores)) != len(self.scores):
            raise ValueError("scores holds one twice")
        if (self.target == "given") != bool(self.tokens):
            raise ValueError("tokens are for target: given, which needs them")
        return self


@dataclass(frozen=True)
class Part:
    """A linear layer's place in the columns `signed` and `abs`, and, if its input is counted under it, in `sumsq`."""

    name: str  # layers.3.mlp.up_proj
    outputs: int
    inputs: int
    first: int  # of its outputs
    input_of: str  # the part under which its input is counted
    first_input: int  # of that one's inputs


class Attribution(Experiment):
    kind: Literal["attribution"]
    model: ModelSpec
    data: TokenSets
    score: AttributeSpec = AttributeSpec()
    max_samples: int | None = Field(None, ge=1, description="only the first samples of each set, for a trial")

    job: ClassVar[str] = "compute_attributions"
    submit: ClassVar[str] = "submit-attributions"
    results: ClassVar[str] = "export-attributions"
    share: ClassVar[float] = 0.69  # 67 TFLOP in 0.122 s on an H200: Llama-3-8B shapes, neuron level (README, Speed)

    def models(self) -> list[ModelSpec]:
        return [self.model]

    def datasets(self) -> list[DatasetSpec]:
        return []

    def token_sets(self) -> TokenSets:
        return self.data

    def names(self) -> list[str]:
        return [name for name in self.data.sets() if name not in NO_CELLS]

    def input_of(self, cache: Path, cell: str) -> SamplesInput:
        return self.data.prepared(cache, self.model, cell)

    def samples(self, cache: Path, cell: str) -> int:
        found = self.input_of(cache, cell).attributed
        return min(found, self.max_samples or found)

    def batch(self, cache: Path, cell: str) -> tuple[int, int]:
        """(samples, tokens) of every batch of a cell: its shape decides the last bits, so it is the experiment's."""
        width = -(-self.input_of(cache, cell).longest // WIDTH_STEP) * WIDTH_STEP
        most, count = max(1, self.score.batch_tokens // width), self.samples(cache, cell)
        if self.score.level == "weight":
            count = min(count, self.score.block)
        return -(-count // -(-count // most)), width  # as few batches as can be, evenly filled

    def shard_rows(self, cache: Path, cell: str) -> int:
        """Level neuron: whole batches, since a part of one takes as long. Level weight: a block is large."""
        if self.score.level == "weight":
            return 1
        batch = self.batch(cache, cell)[0]
        return -(-self.run.shard_rows // batch) * batch

    def layout(self, cache: Path) -> list[Part]:
        """The scored layers, by the checkpoint's headers."""
        folder = Path(model_input(cache, self.model.id, self.model.revision).path)
        family, tensors = family_in(folder, NO_RULES), folder_tensors(folder)
        shapes = {name: tensors[stored].shape for name, stored in linear_weights(tensors).items()}
        chosen = choose(family, shapes, self.score.layers)
        inputs, parts = shared_inputs(family, chosen), []
        first, first_input, places = 0, 0, {}
        for name in chosen:
            if inputs[name] == name:
                places[name] = first_input
                first_input += shapes[name][1]
        for name in chosen:
            rows, columns = shapes[name]
            parts.append(Part(name, rows, columns, first, inputs[name], places[inputs[name]]))
            first += rows
        return parts

    def explained(self, cache: Path) -> int:
        """Explained tokens a sample, at most."""
        if self.score.target == "all":
            return max(self.batch(cache, name)[1] for name in self.names())
        return len(self.score.tokens) or 1

    def schema(self, cache: Path) -> dict[str, Column]:
        parts = self.layout(cache)
        counted = [part for part in parts if part.input_of == part.name]
        explained = self.explained(cache)
        columns = {"nonfinite": Column("int32", shape=(len(parts),))}
        if self.score.level == "neuron":
            columns |= {"tokens": Column("int32")}
            if self.score.scores:
                columns |= {"target": Column("int32", shape=(explained,)), "logit": Column("float32")}
            columns |= {kind: Column("float32", shape=(sum(p.outputs for p in parts),)) for kind in self.score.scores}
        else:
            columns |= {"samples": Column("int32"), "tokens": Column("int64")}
            if self.score.scores:  # of each sample of the block; -1 and NaN where the last block has fewer
                columns |= {"target": Column("int32", shape=(self.score.block, explained))}
                columns |= {"logit": Column("float32", shape=(self.score.block,))}
            for kind in self.score.scores:
                for p in parts:
                    columns[f"{kind}/{p.name}"] = Column(self.score.store, shape=(p.outputs, p.inputs), raw=True)
        if self.score.wanda:
            columns["sumsq"] = Column("float32", shape=(sum(p.inputs for p in counted),))
        return columns

    def cells(self, cache: Path, scratch: Path) -> list[Cell]:
        """A set's digest knows nothing of the other sets, so adding a behaviour redoes nothing (but for target=all and
        prompts longer than all else: every cell has as many columns)."""
        model, found = model_input(cache, self.model.id, self.model.revision).fingerprint, []
        for index, name in enumerate(self.names()):
            rows = self.samples(cache, name)
            parts = {
                "kernel": KERNEL,
                "model": {"fingerprint": model, "dtype": self.model.dtype},
                "data": self.input_of(cache, name).sha256,
                "samples": rows,
                "score": self.score.model_dump(mode="json", exclude={"nonfinite"}),
            }
            if self.score.target == "all":
                parts["explained"] = self.explained(cache)
            digest = digest_of(parts)
            if self.score.level == "weight":
                rows = -(-rows // self.score.block)
            found.append(Cell(index, name, rows, digest, scratch / self.label / "cells" / f"{name}-{digest[:8]}"))
        return found

    def estimate(self, cache: Path, cell: Cell, gpu: str) -> Estimate:
        """2 operations a parameter and token forward, as many for the inputs' gradients, 2 a scored weight and token
        for the weights' gradients; padding is computed too. Attention is left out: 4 % at 2,048 tokens of an 8B."""
        body = model_input(cache, self.model.id, self.model.revision).body_parameters
        gradients = self.score.level == "weight" or "abs" in self.score.scores
        scored = sum(p.outputs * p.inputs for p in self.layout(cache)) if gradients else 0
        tokens = self.samples(cache, cell.name) * self.batch(cache, cell.name)[1]
        flops = 2 * tokens * (body * (2 if self.score.scores else 1) + (scored if self.score.scores else 0))
        size = stored_bytes(self.schema(cache), cell.total, 0)
        return Estimate(computing_seconds(flops, gpu, self.share, self.run.gpus), size)
