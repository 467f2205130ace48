"""One way for every kind of input: what lies whole in the cache is kept, the rest is made by one process at a time.

An input has a folder, and a record in it (a dataclass in a JSON file) that is written last and vouches for the rest. A
lab shares the cache: who comes second to what is being made waits, and then finds it there. Whoever only reads needs no
more than to read."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lib.base.turns import one_at_a_time
from lib.store.markers import sweep

Record = TypeVar("Record")


def kept_or_made(folder: Path, what: str, kept: Callable[[], Record | None], make: Callable[[], Record]) -> Record:
    """`kept`: the record, where all that it vouches for is there and right."""
    found = kept()
    if found is None:
        with one_at_a_time(folder.with_name(f"{folder.name}.lock"), what):
            sweep(folder.parent)
            sweep(folder)
            found = kept() or make()
    return found
