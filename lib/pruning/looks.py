"""What a model is asked about texts, whichever of its neurons or weights are gone: perplexity by named conventions."""

from pathlib import Path

from pydantic import Field, model_validator

from lib.base.atomic import sha256_file
from lib.config.frozen import Frozen
from lib.evaluation.perplexity import Convention, label
from lib.inputs.specs import TextSpec
from lib.store import Column

DENSE = "dense"  # a cell: the model as it is


class Anchor(Frozen):
    """What somebody else has measured, shown beside ours."""

    measure: str = Field(description="window2048, stride512, word; of a sweep also toxicity (the first judge's mean)")
    value: float
    source: str = Field(min_length=1)
    within: float = Field(0.01, gt=0, description="relative difference that is called the same")

    def beside(self, ours: float | None) -> tuple[float | None, str]:
        """How far ours is off, and what to call it."""
        off = None if ours is None else ours / self.value - 1
        return off, "missing" if off is None else "as expected" if abs(off) <= self.within else "other"


class TextsSpec(Frozen):
    perplexity: list[Convention] = Field(
        default=["window"],
        description="on the attribution's `text`: window is Wanda's, stride the seed's, word lm-eval's",
    )
    window: int = Field(2048, ge=4, description="tokens of a window")
    text: TextSpec | None = Field(None, description="another text for perplexity than the attribution's")
    tasks: list[str] = Field(default=[], description="zero-shot tasks by lm-eval")
    tasks_folder: str | None = Field(None, description="tasks of your own: YAML files in lm-eval's form, and rows")
    batch_tokens: int = Field(16384, ge=16, description="tokens of a batch for perplexity")

    @model_validator(mode="after")
    def _once(self) -> "TextsSpec":
        if len(set(self.perplexity)) != len(self.perplexity):
            raise ValueError("perplexity holds one twice")
        return self

    @property
    def labels(self) -> list[str]:
        return [label(convention, self.window) for convention in self.perplexity]

    @property
    def own_tasks(self) -> Path | None:
        return Path(self.tasks_folder) if self.tasks_folder else None

    def columns(self) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for name in self.labels:
            found[f"perplexity/{name}"] = Column("float64")
            found[f"windows/{name}"] = Column("int32")
            found[f"nll/{name}"] = Column("float64", per=f"windows/{name}")  # summed over a window
            found[f"predictions/{name}"] = Column("int32", per=f"windows/{name}")
        return found | {f"task/{task}": Column("float64", shape=(2,)) for task in self.tasks}  # and its standard error

    def identity(self) -> dict[str, object]:
        """All that decides what is seen, but for the texts themselves."""
        found = self.model_dump(mode="json", exclude={"text", "judges", "neutral", "effect", "tasks_folder"})
        if own := self.own_tasks:
            files = sorted(path for path in own.rglob("*") if path.is_file())
            found["own_tasks"] = {str(path.relative_to(own)): sha256_file(path) for path in files}
        return found

    def passes(self) -> float:
        """How often each token of the text is computed."""
        return sum({"window": 1.0, "stride": 4.0, "word": 1.0}[convention] for convention in self.perplexity)
