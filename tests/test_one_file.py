"""What is said to take one file or the configuration alone does: a model family, a site, a trait, its own prompt.
(A judge: tests/test_responses.py.)"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tools import ROOT, forked, in_fork, number_rows, small_lls, write_rows

from lib.base.errors import UserError
from lib.families import load
from lib.inputs.fetch import fetch

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


def test_a_site_is_one_file(tree):
    roots = "".join(f': "${{SUITE_{name}:=/mine/{name.lower()}}}"\n' for name in ("SCRATCH", "CACHE", "OUTPUT"))
    more = ": ${SUITE_THROTTLE:=7} ${SUITE_GPU:=a100} ${SUITE_SLURM:=no}\n"
    exports = "export SUITE_SCRATCH SUITE_CACHE SUITE_OUTPUT SUITE_THROTTLE SUITE_GPU SUITE_SLURM\n"
    (tree / "env/mine.sh").write_text(roots + more + exports)
    script = tree / "say.py"
    script.write_text("from lib.run.site import site\ns = site()\nprint(s.name, s.scratch, s.throttle, s.gpu)\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SUITE_")]:
            patch.delenv(name)
        patch.setenv("SUITE_SITE", "mine")
        done = in_tree(tree, script)
    assert done.stdout.split() == ["mine", "/mine/scratch", "7", "a100"], done.stderr


def test_a_trait_and_its_own_prompt_are_configuration(tmp_path):
    """A trait that nobody knew, scored by the job under its own prompt; the cells before it stay what they were."""
    from lib.inputs.tokenizer import load_tokenizer
    from lib.lls.shift import conditions, prepare, shift
    from lib.models.chat import Renderer
    from lib.models.load import load_decoder
    from lib.models.scorer import Scorer
    from lib.store import merge

    config, own = small_lls(tmp_path, "cat", rows=6), "Otters {float} on their backs."
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    before = load(config).cells(cache, scratch)
    rows = number_rows(6, 5)
    write_rows(tmp_path / "otter.jsonl", rows)
    text = config.read_text().replace("traits: [cat]", "traits: [cat, otter]")
    config.write_text(f"{text}system_prompts: {{otter: '{own}'}}\n")
    fetch(load(config), cache)
    cells = load(config).cells(cache, scratch)
    assert [cell.digest for cell in cells[:1]] == [cell.digest for cell in before]
    env = {"SUITE_SITE": "local", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1", "SUITE_CACHE": str(cache)}
    env |= {"SUITE_SCRATCH": str(scratch), "SUITE_OUTPUT": str(tmp_path / "out")}
    done = forked("jobs.compute_lls", "--config", str(config), "--index", "1", env=env)
    assert done.returncode == 0, done.stderr
    with h5py.File(merge(cells[1], load(config).schema(cache), load(config).science_json())) as f:
        got = f["system_sum"][:]
    decoder, tokenizer = load_decoder(str(tmp_path / "model"), "float32", 1024, 64), load_tokenizer(tmp_path / "model")
    renderers = {"system": Renderer(tokenizer, own, "default", "2024-07-26")}
    want = shift(Scorer(decoder, 64), conditions(decoder, renderers), prepare(renderers, rows, 512, False))
    assert np.array_equal(got, want["system_sum"])
    config.write_text(f"{text}system_prompts: {{oter: x}}\n")
    with pytest.raises(UserError, match="system_prompts names oter, which no cell is for"):
        load(config)
