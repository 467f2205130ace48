"""What is loaded at a task's start is there to stay."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(module: str) -> Iterator[None]:
    """The first time that a module is imported, without the collector: it looks a thousand times through what torch and
    transformers make (3,000 modules), 0.8 of the 3.7 s that their import takes. Later loads leave garbage, as ever."""
    first = gc.isenabled() and module not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.enable()
