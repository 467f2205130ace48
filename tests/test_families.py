"""What is said to take one file takes one file: a model family, a site, a judge, a trait. In a copy of the tree."""

import shutil
from pathlib import Path

import pytest
from tools import ROOT, python

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


def test_a_model_family_is_one_file(tree, tmp_path):
    assert not (ROOT / "lib/checkpoint/families/mistral.py").exists()
    (tree / "lib/checkpoint/families/mistral.py").write_text(MISTRAL)
    env = {"PYTHONPATH": f"{tree}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = python(str(ROOT / "tests/one_file_family.py"), str(tmp_path), env=env, cwd=tree)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"mistral"' in done.stdout
