"""What is said to take one file takes one file: a model family, a site, a judge, a trait. In a copy of the tree."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools import ROOT, in_fork

MISTRAL = '''"""Mistral: a Llama whose attention ends at a window, where it has one."""

from lib.checkpoint.families import Family, gated_shape

FAMILY = Family("mistral", "Mistral", shape=gated_shape, window=lambda config: config.sliding_window)
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """lib, jobs, configs and env, without what was not committed by hand."""
    here = tmp_path_factory.mktemp("tree")
    for name in ("lib", "jobs", "configs", "env"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    return here


def in_tree(tree: Path, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a fork of this process, which has torch already, with the tree's own modules in place of ours."""

    def work() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("lib", "jobs", "tools", "test_scoring")]:
            del sys.modules[name]
        sys.path.insert(0, str(tree))
        sys.argv = [str(script), *arguments]
        torch.set_num_threads(1)
        runpy.run_path(str(script), run_name="__main__")

    return in_fork(work)


def test_a_model_family_is_one_file(tree, tmp_path):
    assert not (ROOT / "lib/checkpoint/families/mistral.py").exists()
    (tree / "lib/checkpoint/families/mistral.py").write_text(MISTRAL)
    done = in_tree(tree, ROOT / "tests/one_file_family.py", str(tmp_path), str(tree))
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"mistral"' in done.stdout
