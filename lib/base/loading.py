"""What is loaded at a task's start is there to stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector, which looks a thousand times through what torch and transformers make when they are
    imported (3,000 modules): 0.8 of the 3.7 s that takes. What was loaded before and is in nobody's use goes first."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
