"""Read configs/*.yaml with key=value overrides; mistakes name the file, the key, what is valid and the nearest."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lib.base.atomic import read_file
from lib.base.errors import UserError, nearest
from lib.config.frozen import Configuration, digest_of
from lib.config.plain import DEEPEST, NotPlain, parse_yaml

E = TypeVar("E", bound=Configuration)
Kinds = Mapping[str, type[E]]


def overrides_of(text: str) -> list[str]:
    """SET's overrides: parted by blanks, with a shell's quotes around a value that holds one."""
    try:
        return shlex.split(text)
    except ValueError as e:
        why = str(e)[:1].lower() + str(e)[1:]
        raise UserError(
            f"SET={text}: {why}; write a value with blanks or quotes as 'key=a b', quotes and all"
        ) from None


def load(path: str | Path, overrides: list[str] | None, kinds: Kinds[E]) -> E:
    """The experiment in a file, with dotted key=value overrides applied."""
    path = Path(path)
    for text in (str(path), *(overrides or [])):
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes that are no text
            raise UserError(f"{text!r} is not text in UTF-8")
    raw = _read(path)
    experiment = _validate(path, raw, kinds)
    if not overrides:
        return experiment
    for item in overrides:
        _override(raw, item)
    changed = _validate(path, raw, kinds)
    if changed.science() != experiment.science() and changed.name == experiment.name:
        changed._label = f"{changed.name}-{digest_of(changed.science())[:8]}"
    return changed


def _read(path: Path) -> dict[str, object]:
    try:
        raw = parse_yaml(read_file(path).decode())
    except FileNotFoundError:
        have = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
        raise UserError(
            f"{path}: no such file; there are: {', '.join(have) or 'none'}{nearest(str(path), have)}"
        ) from None
    except (NotPlain, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    except (OSError, ValueError) as e:  # the latter: no path at all
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return raw


def _override(raw: dict[str, object], item: str) -> None:
    shown = item if len(item) < 80 else f"{item[:80]}..."
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise UserError(f"override '{shown}' is not key=value, e.g. model.dtype=float32")
    try:
        value = parse_yaml(text)
    except NotPlain as e:
        raise UserError(f"override '{shown}': the value is not valid YAML ({e}); quote it") from None
    *parents, last = key.split(".")
    if len(parents) > DEEPEST:
        raise UserError(f"override '{shown}': no key lies that deep")
    here = raw
    for name in parents:
        below = here.setdefault(name, {})
        if not isinstance(below, dict):
            raise UserError(f"override '{shown}': '{name}' holds a value, not further keys")
        here = below
    here[last] = value


def _validate(path: Path, raw: dict[str, object], kinds: Kinds[E]) -> E:
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(
            f"{path}: kind: must be one of {', '.join(kinds)}; got {kind!r}{nearest(str(kind), list(kinds))}"
        )
    try:
        found = kinds[kind].model_validate(raw)
        found._origin = path
        return found
    except ValidationError as e:
        errors = e.errors()
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{path}: {_explain(kinds[kind], errors[0])}{more}") from None


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    """One pydantic error as 'key: what is wrong; valid: ...'."""
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc) or "the file"
    if error["type"] == "extra_forbidden":
        valid = _fields(model, loc[:-1])
        return f"{where}: unknown key; valid: {', '.join(valid)}{nearest(loc[-1], valid)}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    said = f"{where}: {error['msg'].removeprefix('Value error, ')}"
    if isinstance(error["input"], dict) and error["type"] == "value_error":  # of several keys: it names them itself
        return said
    got = repr(error["input"])
    options = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
    hint = nearest(str(error["input"]), options) if error["type"] == "literal_error" else ""
    return f"{said}; got {got[:80]}{hint}"


def _fields(model: type[BaseModel], loc: list[str]) -> list[str]:
    """The valid keys at a place in the configuration."""
    for name in loc:
        field = model.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
