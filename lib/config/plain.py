"""YAML as configurations use it: text, numbers, true, false, null, lists, and mappings of text to these.

YAML can say far more, and some reader stumbles over each of it or never ends: parts that stand elsewhere again by name
(nine lines are then a billion values), types by name, days, numbers and depths without an end."""

import re
from collections.abc import Hashable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from lib.base.errors import UserError, one_line
from lib.base.typed import LARGEST

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # but for tab and newline; halves of a character
LONGEST, DEEPEST = 200_000, 20  # characters, and levels; ours have 1,500 and 5


def read_like(path: Path, ours: Path) -> Any:
    """What a data file holds that is to have the shape of one of ours."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(
            f"{path} cannot be read as YAML ({type(e).__name__}); it must be in the shape of {ours}"
        ) from None


class NotPlain(ValueError):
    """Text that is no such YAML; says why."""


def parse_yaml(text: str) -> Any:
    """A text that several ask for, such as a configuration that stages share, is read once."""
    return deepcopy(_parsed(text))


@lru_cache(64)
def _parsed(text: str) -> Any:
    if len(text) > LONGEST:
        raise NotPlain(f"it has {len(text)} characters, {LONGEST} are read")
    try:
        value = yaml.load(text, Loader=_Loader)
    except NotPlain:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # the latter from numbers that look like some
        raise NotPlain(one_line(e)) from None
    _check(value)
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, types by name, days and depth, that refuses a key written twice (YAML would keep the
    last one in silence)."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise NotPlain(f"line {event.start_mark.line + 1}: *{event.anchor} stands for another part; write it out")
        if getattr(event, "tag", None):
            raise NotPlain(f"line {event.start_mark.line + 1}: types are not said (!...); quote a text that begins so")
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotPlain(f"it is more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """YAML 1.1 reads 010 as 8, 1:30 as 90 and 1_0 as 10: nobody who types them means that."""
        number = super().construct_yaml_int(node)
        if str(node.value).lstrip("+") != str(number):
            raise NotPlain(f"{node.value} would be read as {number}; write that, or quote it as a text")
        return number

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_DAYS = "tag:yaml.org,2002:timestamp"  # a day is text here, as it is to who reads it
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _DAYS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check(value: object) -> None:
    """Numbers have a size that something here could have, and texts are texts that can be written and shown."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key)
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)
    elif isinstance(value, str):
        if odd := _CONTROL.search(value):
            raise NotPlain(f"a text holds {odd[0]!r}, which is no character of a text")
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise NotPlain(f"no number beyond {LARGEST:.0e} has a meaning here")
