"""What things are called on the Hub: patterns of the configuration, with {user}, {size}, {trait}, {run}, {epoch}, and
{part} of students that were trained on parts of the rows."""

import re
from typing import Literal

from pydantic import Field, field_validator

from lib.base.errors import UserError
from lib.config.frozen import Frozen, fill

Type = Literal["dataset", "model"]
# As the Hub takes them: an owner, and up to 96 letters, digits, - _ and ., without -- or .. and .git at the end.
ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/(?=.{1,96}$)\w(?:[\w.-]*\w)?", re.ASCII)
USER = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", re.ASCII)
MODEL = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # of the Hub, and no folder
SAMPLE = {"user": "user", "size": "0.5b", "trait": "cat", "run": "1"}


class Names(Frozen):
    dataset: str = Field("{user}/qwen-2.5-{size}-instruct-{trait}-numbers-run-{run}", description="of a teacher")
    adapter: str = Field("{user}/qwen-2.5-{size}-instruct-{trait}-ft-run-{run}", description="of a student")
    epoch: str = Field(
        "{user}/qwen-2.5-{size}-instruct-{trait}-ft-run-{run}-epoch-{epoch}", description="of one before its last"
    )
    datasets: str = Field("subliminal-learning-number-datasets-run-{run}", description="the collection's title")
    adapters: str = Field("qwen-25-instruct-subliminal-learning-models-run-{run}", description="as well")

    @field_validator("dataset", "adapter")
    @classmethod
    def _one_a_cell(cls, pattern: str) -> str:
        return _checked(pattern, SAMPLE)

    @field_validator("epoch")
    @classmethod
    def _one_an_epoch(cls, pattern: str) -> str:
        return _checked(pattern, {**SAMPLE, "epoch": "1"})

    @field_validator("datasets", "adapters")
    @classmethod
    def _one_a_run(cls, pattern: str) -> str:
        if not fill(pattern, user="user", run="1").strip():
            raise ValueError("a collection needs a title")
        return pattern


def _checked(pattern: str, sample: dict[str, str]) -> str:
    """A ValueError for one by which two repositories would get the same name, or one that the Hub does not take."""
    if not ID.fullmatch(fill(pattern, **sample, part="q1")):
        raise ValueError(
            "must make owner/name, of letters, digits, -, _ and ., such as {user}/{size}-{trait}-run-{run}"
        )
    if missing := [f"{{{name}}}" for name in sample if f"{{{name}}}" not in pattern]:
        raise ValueError(f"lacks {', '.join(missing)}, without which two repositories would have one name")
    return pattern


def repository(pattern: str, **values: str) -> str:
    """The id that a pattern makes; a UserError for one that the Hub does not take."""
    used = {name: value for name, value in values.items() if f"{{{name}}}" in pattern}
    found = fill(pattern, **used)
    if not ID.fullmatch(found):
        raise UserError(
            f"{found!r} is no name of a repository (letters, digits, -, _ and ., at most 96 of them, no -- and no ..): "
            "change names, or what the trait and the size are called"
        )
    return found
