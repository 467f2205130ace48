"""Python's collector stays away while a task loads, and when it ends."""

import gc
import subprocess
import sys

import pytest
from tools import ROOT

from lib.base.loading import uncollected


def test_a_module_is_imported_without_it_once():
    with uncollected("no_such_module"):
        assert not gc.isenabled()
        with uncollected("another"):
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with uncollected("pytest"):  # which is there
        assert gc.isenabled()
    with pytest.raises(ImportError), uncollected("no_such_module"):
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("main, code", [("lambda: 3", 3), ("lambda: next(iter([]))", 1)])
def test_what_a_job_has_loaded_is_not_looked_through_at_its_end(main, code):
    told = "atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    words = f"import atexit, gc; from lib.base.errors import exit_with; {told}; exit_with({main})"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "True\n"), done.stderr
