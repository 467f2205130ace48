"""The parts of a configuration file that are the same for every experiment: frozen models, a name, digests."""

import hashlib
import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr


class Frozen(BaseModel):
    """Immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def digest_of(parts: Mapping[str, object]) -> str:
    """sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Configuration(Frozen):
    """One file of configs/."""

    kind: str
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)
    _label: str = PrivateAttr("")

    @property
    def label(self) -> str:
        """The name of its folders and jobs. Overrides that change results add a suffix: a trial never shares a path."""
        return self._label or self.name

    def science(self) -> dict[str, object]:
        """The part of the configuration that can change a result."""
        return self.model_dump(mode="json", exclude={"name", "run"})

    def science_json(self) -> str:
        return json.dumps(self.science(), sort_keys=True)
