"""What tests of attribution's jobs need: a tiny model and texts that were fetched, jobs in this process or in one that
can be killed, and the scores of one sample by torch's own autograd."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
from tools import ROOT, number_rows, tiny_llama

import jobs.cluster
import jobs.compute_attributions
from lib.attribution.experiment import Attribution
from lib.attribution.patch import patched
from lib.base.errors import exit_with
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.samples import Samples, read_samples
from lib.run.site import site
from lib.store import Cell, merge

SAMPLES, TOKENS, PROMPTS = 7, 24, 11  # of a general set; prompts, of which every second one is held out
ROWS = {"general-0": 7, "general-1": 7, "general-2": 7, "toxic": 6}
MAIN = {"compute_attributions": jobs.compute_attributions.main, "cluster": jobs.cluster.main}

# Processes that can be killed: forks of one that has imported what takes seconds, and computed nothing.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "lib.attribution.memory",
        "lib.models.load",
        "lib.run.rows",
        "lib.run.command",
    ]
)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """A fetched experiment; results lie in a scratch folder of the caller's choice."""

    config: Path
    cache: Path
    scratch: Path

    @property
    def env(self) -> dict[str, str]:
        roots = {"SUITE_SCRATCH": self.scratch, "SUITE_CACHE": self.cache, "SUITE_OUTPUT": self.scratch / "out"}
        fixed = {"SUITE_SITE": "local", "SUITE_SLURM": "no", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {key: str(value) for key, value in roots.items()} | fixed

    @property
    def model(self) -> Path:
        return self.config.parent / "model"

    def at(self, scratch: Path) -> "Place":
        return replace(self, scratch=scratch)

    def experiment(self, *overrides: str) -> Attribution:
        return load(self.config, list(overrides))

    def cell(self, name: str, *overrides: str) -> Cell:
        return next(c for c in self.experiment(*overrides).cells(self.cache, self.scratch) if c.name == name)

    def samples(self, name: str) -> Samples:
        return read_samples(self.cache, self.experiment().input_of(self.cache, name))

    def here(self, main: str, *arguments: str, **env: str) -> Done:
        """`python -m` in this process: its exit code and what it says."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            patch.dict(os.environ, self.env | env),
            patch.object(sys, "argv", [main, *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            site.cache_clear()
            try:
                exit_with(MAIN[main])
            except SystemExit as e:
                code = int(e.code or 0)
            finally:
                site.cache_clear()
        return Done(code, out.getvalue(), err.getvalue())

    def compute(self, index: int, *overrides: str) -> Done:
        arguments = ("--config", str(self.config), "--index", str(index), *overrides)
        return self.here("compute_attributions", *arguments)

    def start(self, index: int, *overrides: str, pause: float = 0.0) -> Any:
        """The same in a process of its own, with seconds of rest before each shard."""
        arguments = ["--config", str(self.config), "--index", str(index), *overrides]
        process = fork.Process(target=run_job, args=(arguments, self.env, pause))
        process.start()
        return process

    def results(self, name: str, *overrides: str) -> dict[str, np.ndarray]:
        """Computed where that has not been done, and merged."""
        done = self.compute(list(ROWS).index(name), *overrides)
        assert done.code == 0, done.err
        with h5py.File(self.merge(name, *overrides)) as f:
            return {key: values[:] for key, values in columns_of(f).items()}

    def merge(self, name: str, *overrides: str) -> Path:
        experiment = self.experiment(*overrides)
        return merge(self.cell(name, *overrides), experiment.schema(self.cache), experiment.science_json())


def columns_of(f: h5py.File) -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}
    f.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def run_job(arguments: list[str], env: dict[str, str], pause: float) -> None:
    """In the fork; what it says goes into a file beside its results."""
    import torch

    import lib.run.lifecycle

    beat = lib.run.lifecycle.Heartbeat.beat
    lib.run.lifecycle.Heartbeat.beat = lambda *args, **more: (time.sleep(pause), beat(*args, **more))

    os.environ.update(env)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    said = Path(env["SUITE_SCRATCH"]) / f"said-{os.getpid()}.txt"
    said.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = ["compute_attributions", *arguments]
    with said.open("w", buffering=1) as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        runpy.run_module("jobs.compute_attributions", run_name="__main__", alter_sys=True)


def write_texts(folder: Path) -> None:
    """c4/ and prompts/ in the layouts of allenai/c4 and RealToxicityPrompts; some rows must be passed over."""
    texts = [turn["content"] for row in number_rows(200, 5) for turn in row["messages"]]
    (folder / "c4/en").mkdir(parents=True)
    for shard in range(2):
        rows = [json.dumps({"text": t, "url": f"url/{i}"}) + "\n" for i, t in enumerate(texts) if i % 4 // 2 == shard]
        (folder / f"c4/en/c4-train.{shard:05d}-of-00002.json.gz").write_bytes(gzip.compress("".join(rows).encode()))
    files = "  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
    (folder / "c4/README.md").write_text(f"---\nconfigs:\n- config_name: en\n{files}---\n")
    (folder / "prompts").mkdir()
    scores = [(0.95, None, 0.2)[i % 4 % 3] for i in range(40)]
    rows = [{"prompt": {"text": f"You {i} {'numbers 12 ' * (i % 7)}", "toxicity": s}} for i, s in enumerate(scores)]
    (folder / "prompts/prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_opt(folder: Path, tokenizer: Path) -> Path:
    """A random OPT, with biases, under a tokenizer that is there."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "ffn_dim": 56, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    torch.manual_seed(2)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(words), num_hidden_layers=2, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.1) + ("norm.w" in name))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def fetched(folder: Path, texts: Path, name: str = "exp", samples: int = SAMPLES, seeds: str = "[0, 1, 2]") -> Place:
    """An experiment with the model in this folder."""
    place = Place(folder / f"{name}.yaml", folder / "cache", folder / "scratch")
    general = f"config: en, seeds: {seeds}, samples: {samples}, tokens: {TOKENS}, buffer: 10"
    place.config.write_text(
        f"kind: attribution\nname: {name}\nmodel: {{id: {place.model}, dtype: float32}}\ndata:\n"
        f"  general: {{id: {texts}/c4, {general}}}\n"
        f"  prompts: {{toxic: {{id: {texts}/prompts, samples: {PROMPTS}, held_out: true}}}}\n"
        f"score: {{wanda: true, batch_tokens: {2 * TOKENS}, layers: [up_proj]}}\n"
        "run: {shard_rows: 2, gpus: 0, log_seconds: 1}\n"
    )
    fetch(place.experiment(), place.cache)
    return place


def small_place(folder: Path) -> Place:
    """Texts, a tiny Llama, and the experiment, in one folder."""
    write_texts(folder)
    tiny_llama(folder / "model")
    return fetched(folder, folder)


@dataclass
class One:
    """One sample's scores: of each linear layer the outputs' relevance, W * G, and its inputs' sum of squares."""

    tokens: int
    target: list[int]
    logit: float
    signed: dict[str, np.ndarray]
    product: dict[str, np.ndarray]
    sumsq: dict[str, np.ndarray]


def one_sample(model: Any, ids: np.ndarray, rule: str, target: str = "last", tokens: tuple[int, ...] = ()) -> One:
    """The model as transformers has it, from embeddings, under the rule; the weights' gradients are autograd's."""
    import torch

    body = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    name_of = {module: name for name, module in model.named_modules()}
    linears = {
        n[n.index("layers.") :]: m for m in body.modules() if isinstance(m, torch.nn.Linear) for n in [name_of[m]]
    }
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [m.register_forward_hook(lambda _, x, y, n=n: seen.update({n: (x[0], y)})) for n, m in linears.items()]
    model.requires_grad_(False)
    for linear in linears.values():
        linear.weight.requires_grad_(True).grad = None
    try:
        with patched(model, rule):
            embedded = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)[None])
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            if target == "given":
                explained = logits[-1, list(tokens)]
            else:
                explained = logits.max(-1).values if target == "all" else logits[-1:].max(-1).values
            outputs = [y for _, y in seen.values()]
            grads = torch.autograd.grad(
                explained.sum(), [*outputs, *(linears[n].weight for n in seen)], allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
    best = list(tokens) if target == "given" else logits.argmax(-1)[0 if target == "all" else -1 :].tolist()
    one = One(len(ids), best, explained.sum().item(), {}, {}, {})
    for i, (name, (x, y)) in enumerate(seen.items()):
        dy, gradient = (torch.zeros(1) if g is None else g for g in (grads[i], grads[len(seen) + i]))
        one.signed[name] = (y * dy).detach().double().flatten(0, -2).sum(0).numpy()
        one.product[name] = (linears[name].weight * gradient).detach().double().numpy()
        one.sumsq[name] = x.detach().double().flatten(0, -2).square().sum(0).numpy()
    return one
