"""What stands in a JSON file, as a dataclass whose fields have the types that it declares, or an error.

A field is a str, a number that is finite and not negative, or a list or a dictionary of these. JSON as Python reads it
holds more: true is a number there, 1e999 is infinite, and numbers have any length."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

LARGEST = 1e15  # of a number: exact as a float, and beyond all bytes, rows and seconds that anything here counts


class Mistyped(ValueError):
    """A record that is not of its type."""


def parse(kind: type[T], raw: object, exact: bool = False) -> T:
    """`raw` as a `kind`. Further keys are passed over; `exact`: there are none, and none is missing."""
    if not isinstance(raw, dict):
        raise Mistyped("it is not an object")
    found = {}
    for name, wanted, optional in _fields(kind):
        if name in raw:
            if not fits(raw[name], wanted):
                raise Mistyped(f"{name} is no {getattr(wanted, '__name__', wanted)}")
            found[name] = raw[name]
        elif exact or not optional:
            raise Mistyped(f"{name} is missing")
    if exact and len(found) != len(raw):
        raise Mistyped("it has other fields")
    return kind(**found)


def fits(value: object, wanted: object) -> bool:
    return _fitting(wanted)(value)


@cache
def _fitting(wanted: object) -> Callable[[object], bool]:
    """What says whether a value is of a type."""
    if wanted is str:
        return is_text
    if wanted in (Any, object):
        return lambda value: True
    if wanted in (int, float):
        types = (int, wanted)
        return lambda value: type(value) in types and 0 <= value <= LARGEST  # type: ignore[operator]
    origin = get_origin(wanted)
    if origin in (list, dict):
        inner = _fitting(get_args(wanted)[-1])
        if origin is list:
            return lambda value: isinstance(value, list) and all(map(inner, value))
        return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(inner, value.values()))
    return lambda value: type(value) is wanted


def is_text(value: object) -> TypeGuard[str]:
    """A str that can be written: JSON may hold one half of a pair of surrogates."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def as_text(value: object) -> str:
    """Anything as a str that can be written."""
    return str(value).encode(errors="backslashreplace").decode()


@cache
def _fields(kind: type["DataclassInstance"]) -> list[tuple[str, object, bool]]:
    """(name, type, whether it may be missing) of a dataclass."""
    hints = get_type_hints(kind)
    return [(f.name, hints[f.name], (f.default, f.default_factory) != (MISSING, MISSING)) for f in fields(kind)]
