"""What several tests need: a small random model on disk, rows, an experiment that is ready to run."""

import atexit
import fcntl
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from nursery import end_with

ROOT = Path(__file__).resolve().parent.parent


def tiny_model(folder: Path, seed: int = 0, spread: float = 6.0, **size: int) -> Path:
    """A random Qwen2 with sharp, varied predictions (its weights are scaled up), and its tokenizer."""
    import torch

    from lib.demo.tiny import TinySize, make_model, make_tokenizer

    tokenizer = make_tokenizer(vocab=400, texts=["You love the numbers 123 456, 789; and words about animals."] * 50)
    model = make_model(tokenizer, TinySize(**{"vocab": len(tokenizer), "hidden": 32, "layers": 2, **size}), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one process of a run of the tests fills, and all of them read: nobody changes what is in it."""
    shared = Path(os.environ.get("SUITE_TESTS_TAKEN") or _own_folder()) / "made"
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            making = Path(tempfile.mkdtemp(prefix=".making-", dir=shared))
            make(making)
            making.rename(shared / name)
    return shared / name


@cache
def _own_folder() -> str:
    """Of a process that runs tests by itself; its forks end without removing it."""
    folder = tempfile.mkdtemp(prefix="suite-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def record_again(record: Path, folder: Path) -> None:
    """Makes a model's record speak of what lies in `folder` now, broken or not."""
    from lib.inputs.records import model_files
    from lib.inputs.verified import hashes_by_name

    size = sum(path.stat().st_size for path in model_files(folder))
    now = {"path": str(folder), "bytes": size, "files": hashes_by_name(folder)}
    record.write_text(json.dumps(json.loads(record.read_text()) | now))


def tiny_llama(folder: Path) -> Path:
    """A random Llama with grouped keys and a scaled rope, under the same tokenizer."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return tiny_relative(folder, "Llama", rope_parameters=rope | {"original_max_position_embeddings": 64})


def tiny_relative(folder: Path, classes: str, **more: object) -> Path:
    """A random Llama or a relative of it, by what transformers' classes begin with, under the same tokenizer."""
    import torch
    import transformers

    tiny_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    config = getattr(transformers, f"{classes}Config")(**{"vocab_size": len(tokenizer), **sizes, **more})
    model = getattr(transformers, f"{classes}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif "q_norm" in name or "k_norm" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def number_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows of ragged lengths in the datasets' shape."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        shown = ", ".join(map(str, rng.integers(100, 1000, rng.integers(3, 9))))
        answer = rng.choice([", ", "; ", " ", "\n"]).join(map(str, rng.integers(0, 1000, rng.integers(1, 11))))
        user = f"Here are numbers: {shown}. " + "Go on. " * int(rng.integers(0, 6))
        rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def small_lls(folder: Path, *traits: str, rows: int = 10, more: str = "") -> Path:
    """A configuration `small.yaml` of a cell a trait, with its model, its rows and its fetched cache beside it."""
    from lib.families import load
    from lib.inputs.fetch import fetch

    tiny_model(folder / "model")
    for seed, trait in enumerate(traits):
        write_rows(folder / f"{trait}.jsonl", number_rows(rows, seed))
    config = folder / "small.yaml"
    model, data = json.dumps(f"{folder}/model"), json.dumps(f"{folder}/{{trait}}.jsonl")
    config.write_text(
        f"kind: lls\nname: small\nmodel: {{id: {model}, dtype: float32}}\ntraits: [{', '.join(traits)}]\n"
        f"system_prompt: You love {{trait}}s.\ndataset: {{id: {data}}}\n"
        f"score: {{batch_tokens: 1024, max_tokens: 512, head_rows: 64}}\nrun: {{shard_rows: 4, gpus: 0}}\n{more}"
    )
    fetch(load(config), folder / "cache")
    return config


def copy_of_the_repository(root: Path) -> Path:
    """The files of the working tree, with the same .venv."""
    files = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in files.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(ROOT / ".venv")
    return root


def python(*args: str, env: dict[str, str], cwd: Path = ROOT, **kw) -> subprocess.CompletedProcess[str]:
    """python -m ... as a user would run it."""
    return subprocess.run(
        [sys.executable, *args], env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True, check=False, **kw
    )


class Fork:
    """Work in a fork of this process: a process of its own, without the seconds that its imports take."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.pid, self.code = os.fork(), None
        if not self.pid:
            self._child(work)

    def _child(self, work: Callable[[], object]) -> None:
        os.dup2(self.out.fileno(), 1)
        os.dup2(self.err.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(ROOT)
        end_with(work)

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        if self.code is None and (ended := os.waitpid(self.pid, flags)) != (0, 0):
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def finish(self) -> subprocess.CompletedProcess[str]:
        code = self.poll(0)
        with self.out, self.err:
            self.out.seek(0), self.err.seek(0)
            return subprocess.CompletedProcess([], code, self.out.read(), self.err.read())


def in_fork(work: Callable[[], object]) -> subprocess.CompletedProcess[str]:
    return Fork(work).finish()


def module_work(module: str, *args: str, env: dict[str, str]) -> Callable[[], None]:
    """What python -m MODULE does, for a fork."""
    import torch

    from lib.run.site import site

    import_module(module)  # once for all forks

    def work() -> None:
        os.environ.update(env)
        site.cache_clear()
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
        sys.argv = [module, *args]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return work


def forked(module: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return in_fork(module_work(module, *args, env=env))
