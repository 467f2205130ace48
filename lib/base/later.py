"""Libraries that are imported when something of them is first asked for: the commands that only look need none.

An annotation asks, too, unless its file begins with `from __future__ import annotations`."""

import importlib
import importlib.util
import sys
import threading
from types import ModuleType

_one_at_a_time = threading.Lock()


class Later(ModuleType):
    """Stands where a module will be, and hands on what is asked of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)

    def __getattr__(self, name: str) -> object:  # of what it does not hold itself yet
        with _one_at_a_time:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        self.__dict__.update(vars(module))
        return getattr(module, name)


def later(*names: str) -> None:
    """To be called before others import them. Python's own LazyLoader knows no threads before 3.12.3."""
    for name in names:
        if name not in sys.modules:
            sys.modules[name] = Later(name)
