"""Python's collector stays away while a task loads, and when it ends."""

import gc
import subprocess
import sys
import weakref

import pytest
from tools import ROOT

from lib.base.loading import uncollected


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_what_nobody_uses_goes_before_something_is_loaded_and_nothing_meanwhile():
    before = weakref.ref(Ring())
    with uncollected():
        assert before() is None and not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("main, code", [("lambda: 3", 3), ("lambda: next(iter([]))", 1)])
def test_what_a_job_has_loaded_is_not_looked_through_at_its_end(main, code):
    told = "atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    words = f"import atexit, gc; from lib.base.errors import exit_with; {told}; exit_with({main})"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "True\n"), done.stderr
