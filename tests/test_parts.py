"""The processes that share all tests: every test once, those on Slurm in one process, a failure anywhere is one."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tools import ROOT

FILE = """
import os, time
from pathlib import Path
import pytest

end = time.monotonic() + 60

@pytest.fixture(scope="module")
def shared():
    Path(f"ran/{os.getpid()}").open("a").write(f"setup {__name__}\\n")
    while len(list(Path("ran").iterdir())) < 2 and time.monotonic() < end:  # until another process has shown itself
        time.sleep(0.01)

@pytest.fixture
def slurm():
    yield "pretended"

@pytest.mark.parametrize("number", range(3))
def test_plain(shared, number):
    Path(f"ran/{os.getpid()}").open("a").write(f"plain {__name__} {number}\\n")

def test_slurm(slurm):
    Path(f"ran/{os.getpid()}").open("a").write(f"slurm {__name__}\\n")
"""
FILES = [f"test_{n}" for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ran").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "parts.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    for name in FILES:
        (tmp_path / "tests" / f"{name}.py").write_text(FILE)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "SUITE_TESTS_TAKEN"}
    command = [sys.executable, "tests/parts.py", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_every_test_runs_once_whoever_takes_it(folder):
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    by_process = [path.read_text().splitlines() for path in (folder / "ran").iterdir()]
    plain = [f"plain {name} {number}" for name in FILES for number in range(3)]
    ran = Counter(line for lines in by_process for line in lines)
    assert ran == Counter([*plain, *(f"slurm {name}" for name in FILES), *(f"setup {name}" for name in FILES)])
    assert len(by_process) > 1 and sum(any(line.startswith("slurm") for line in lines) for lines in by_process) == 1


def test_a_failure_in_any_process_is_one_and_what_is_chosen_is_heeded(folder):
    for name in FILES:
        (folder / "tests" / f"{name}.py").write_text(
            "def test_fails():\n    assert 0\n\ndef test_passes():\n    pass\n"
        )
    assert run(folder).returncode == 1
    done = run(folder, "-k passes")
    assert done.returncode == 0 and sum(map(int, re.findall(r"(\d+) passed", done.stdout))) == len(FILES), done.stdout
    assert run(folder, "-k nothing").returncode == 5
