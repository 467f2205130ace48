"""A log whose disk is full (/dev/full: the kernel's own ENOSPC): the work is done all the same, and rightly ended."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import ROOT, small_lls

from lib.base.log import Log
from lib.families import load
from lib.store import scan

LOUD = """import logging, sys
from lib.base.log import going_on_without_log
def loud():
    for number in range(3000):
        print(number, "words" * 9, flush=number % 2 == 0)
        print(number, file=sys.stderr)
        logging.error("a library's")
"""
QUIET = LOUD + "with going_on_without_log():\n    loud()\n"


def into_the_full(command: list[str], **env: str) -> int:
    with Path("/dev/full").open("w") as log:
        return subprocess.call(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **env})


def test_a_task_whose_log_is_full_does_its_work_from_the_batch_file_on(tmp_path):
    config = small_lls(tmp_path, "cat")
    roots = {f"SUITE_{name.upper()}": str(tmp_path / name) for name in ("scratch", "cache", "output")}
    more = {"SUITE_SITE": "local", "SUITE_GPU": "cpu", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1"}
    job = ["bash", "slurm/compute_lls.sbatch", str(config)]
    assert into_the_full(job, SLURM_ARRAY_TASK_ID="0", SLURM_SUBMIT_DIR=str(ROOT), **roots, **more) == 0
    (cell,) = load(config).cells(tmp_path / "cache", tmp_path / "scratch")
    done, bad = scan(cell.path, cell.digest)
    assert sum(one.rows for one in done) == cell.total == 10 and not bad


@pytest.mark.parametrize(("code", "ends"), [(QUIET, 0), (LOUD + "loud()\n", 1), (QUIET + "sys.exit(75)\n", 75)])
def test_its_exit_code_is_the_works_own(code, ends):
    assert into_the_full([sys.executable, "-c", code]) == ends


def test_lines_are_written_again_as_soon_as_there_is_room_and_other_faults_are_told():
    class Stream:
        code, lines = errno.EDQUOT, []

        def write(self, text):
            if self.code:
                raise OSError(self.code, "no")
            self.lines.append(text)

    stream = Stream()
    log = Log(stream)
    assert log.write("lost") == 4
    stream.code = 0
    log.write("kept")
    assert stream.lines == ["kept"]
    stream.code = errno.EBADF
    with pytest.raises(OSError, match="no"):
        log.write("told")
