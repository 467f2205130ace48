"""A library that is imported when something of it is asked for: by whichever thread comes first, and once."""

import importlib
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from lib.base.later import later

SLOW = """
import time
from pathlib import Path

with Path(__file__).with_name("imported").open("a") as f:
    f.write("once")
time.sleep(0.2)
VALUE = [7]


def __getattr__(name):
    if name == "computed":
        return 8
    raise AttributeError(name)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package `slow_to_import` that notes each time it is imported."""
    folder = tmp_path / "slow_to_import"
    folder.mkdir()
    (folder / "__init__.py").write_text(SLOW)
    (folder / "part.py").write_text("PART = 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    later("slow_to_import")
    yield folder
    for name in [name for name in sys.modules if name.startswith("slow_to_import")]:
        del sys.modules[name]


def test_nothing_is_imported_before_it_is_asked_for_and_then_once_by_many_threads(package):
    import slow_to_import as again
    import slow_to_import as first

    assert first is again and not (package / "imported").exists()
    assert importlib.util.find_spec("slow_to_import").origin == str(package / "__init__.py")
    assert not (package / "imported").exists()
    together = Barrier(8)

    def ask(number: int) -> object:
        together.wait()
        return first.VALUE if number % 2 else importlib.import_module("slow_to_import").VALUE

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(ask, range(8)))
    assert (package / "imported").read_text() == "once"
    assert all(value is values[0] for value in values) and values[0] == [7]
    assert first.computed == 8 and first.__file__ == str(package / "__init__.py")
    with pytest.raises(AttributeError, match="nothing"):
        _ = first.nothing


def test_its_parts_are_found(package):
    import slow_to_import.part
    from slow_to_import import VALUE

    assert slow_to_import.part.PART == 9 and VALUE == [7] and (package / "imported").read_text() == "once"


def test_what_is_there_already_stays(package):
    import json

    later("json", "slow_to_import")
    assert sys.modules["json"] is json and not (package / "imported").exists()


def test_what_is_not_installed_says_so_when_it_is_asked_for():
    later("no_such_library_here")
    import no_such_library_here

    with pytest.raises(ModuleNotFoundError, match="no_such_library_here"):
        _ = no_such_library_here.anything
