"""The parts of a configuration file that are the same for every experiment: frozen models, a name, digests."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr


class Frozen(BaseModel):
    """Immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # most commands read a configuration or two of all the kinds that there are
    )


def digest_of(parts: Mapping[str, object]) -> str:
    """sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_folder_names(key: str, names: Iterable[str]) -> None:
    """A ValueError for names that cannot stand in a folder's."""
    for name in names:
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            raise ValueError(f"{key}: {name[:80]!r} must be letters, digits, - or _: it names a folder")
        if len(name.encode()) > 100:
            raise ValueError(f"{key}: {name[:40]!r}... is longer than a folder's name may be")


def fill(text: str, **values: str) -> str:
    """Text with its {names} filled in. Python's own format also takes widths of any size, and looks into values."""
    parts = []
    for before, name, form, convert in Formatter().parse(text):
        if name is not None and (name not in values or form or convert):
            raise ValueError(f"{{{name}}} is not one of {', '.join(values)}")
        parts += [before, values[name] if name is not None else ""]
    return "".join(parts)


class Configuration(Frozen):
    """One file of configs/."""

    kind: str
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)
    _label: str = PrivateAttr("")
    _origin: Path = PrivateAttr(Path())

    @property
    def label(self) -> str:
        """The name of its folders and jobs. Overrides that change results add a suffix: a trial never shares a path."""
        return self._label or self.name

    @property
    def origin(self) -> Path:
        """The file that it was read from; others that it names lie beside it."""
        return self._origin

    def science(self) -> dict[str, object]:
        """The part of the configuration that can change a result."""
        return self.model_dump(mode="json", exclude={"name", "run"})

    def science_json(self) -> str:
        return json.dumps(self.science(), sort_keys=True)
