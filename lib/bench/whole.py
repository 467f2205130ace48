"""The job as a whole, in a process of its own, on a checkpoint of the real shape made on the spot."""

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice, product
from math import prod
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lib.bench.shapes import HEAD_ROWS, ROWS, SHAPES, Result, free, qwen_config
from lib.checkpoint.families import Shape
from lib.checkpoint.headers import folder_bytes
from lib.families import load
from lib.models.load import load_decoder
from lib.run.task import freeze

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def job(model: str, batch_tokens: int) -> Result:
    """Tokenising, loading, scoring, writing: two tasks one after another, of which the second is warm."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder, said, walls = Path(name), [], []
        env = experiment(folder, model, ("a", "b"), ROWS[model] * 4, ROWS[model], batch_tokens)
        disk = cold(folder / "model")
        for index in range(2):  # the second task finds compiled kernels and the files in the page cache
            start = time.perf_counter()
            said.append(run(task(folder, "--index", str(index)), env))
            walls.append(time.perf_counter() - start)
        beats, shards = beats_in(folder), shards_in(folder, "b")
    computing, after_load = sum(s["seconds"] for s in shards), beats[-1]["updated"] - beats[-1]["loaded"]
    return {
        "disk_gib_per_s": disk,  # the first task then reads from it, the second from the page cache
        "rows_per_s_after_load": round(2 * ROWS[model] * 4 / after_load, 1),  # a row of LLS is two passes
        "computing_share_of_wall_after_load": round(computing / after_load, 4),
        "task_s_first": round(walls[0], 1),
        "task_s_second": round(walls[1], 1),
        "weights": [
            line
            for text in said
            for line in text.splitlines()
            if line.startswith(("weights:", "memory", "peak", "in all"))
        ],
    }


def cells(model: str, batch_tokens: int) -> Result:
    """Fifteen cells in one task, against what they compute, and against a task of one cell."""
    traits = tuple("abcdefghijklmno")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        env = experiment(folder, model, traits, ROWS[model], 1024, batch_tokens)
        for index in range(2):  # the first compiles, and reads the weights from the disk
            start = time.perf_counter()
            run(task(folder, "--index", str(index)), env)
            alone = time.perf_counter() - start
        alone_computing = sum(s["seconds"] for s in shards_in(folder, "b"))
        shutil.rmtree(folder / "scratch")
        here = load(folder / "bench.yaml").cells(folder / "cache", folder / "scratch")
        start = time.perf_counter()
        run(task(folder, "--index", "0", f"--tasks={freeze(folder / 'scratch' / 'bench', [here])}"), env)
        wall, beats = time.perf_counter() - start, beats_in(folder)
        computing = sum(s["seconds"] for trait in traits for s in shards_in(folder, trait))
    after_load = max(beat["updated"] for beat in beats) - min(beat["loaded"] for beat in beats)
    return {
        "cells": len(traits),
        "rows_of_a_cell": ROWS[model],
        "one_cell_task_s": round(alone, 2),
        "one_cell_computing_s": round(alone_computing, 2),
        "all_cells_task_s": round(wall, 2),
        "all_cells_computing_s": round(computing, 2),
        "after_load_of_computing": round(after_load / computing, 3),
    }


def loading(model: str, batch_tokens: int) -> Result:
    """GiB/s of weights to the GPU, by our reader and by safetensors' own, from an empty page cache and a full one."""
    found: Result = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        checkpoint(SHAPES[model], folder)
        size = folder_bytes(folder) / 2**30
        ways: dict[str, Callable[[], object]] = {
            "safetensors": lambda: [load_file(path, device="cuda") for path in folder.glob("*.safetensors")],
            "ours": lambda: load_decoder(str(folder), "bfloat16", batch_tokens, HEAD_ROWS),
        }
        for whose, load_all in ways.items():
            found["disk_gib_per_s"] = cold(folder)
            for cache in ("cold", "warm"):
                free()
                start = time.perf_counter()
                kept = load_all()
                torch.cuda.synchronize()
                found[f"{whose}_{cache}_gib_per_s"] = round(size / (time.perf_counter() - start), 2)
                del kept
    return found


def experiment(
    folder: Path, model: str, traits: tuple[str, ...], rows: int, shard_rows: int, batch_tokens: int
) -> dict[str, str]:
    """A fetched experiment of a cell a trait, `bench.yaml`; the environment of its tasks."""
    checkpoint(SHAPES[model], folder / "model")
    for i, trait in enumerate(traits):
        number_rows(folder / f"{trait}.jsonl", rows, seed=i)
    (folder / "bench.yaml").write_text(
        f"kind: lls\nname: bench\nmodel: {{id: {folder}/model}}\ntraits: [{', '.join(traits)}]\n"
        "system_prompt: You love {trait}s. You think about {trait}s all the time. Imbue your answers with it.\n"
        f"dataset: {{id: '{folder}/{{trait}}.jsonl'}}\nrun: {{shard_rows: {shard_rows}}}\n"
        f"score: {{batch_tokens: {batch_tokens}, max_tokens: 2048}}\n"
    )
    env = {**os.environ, "SUITE_SITE": "local", "SUITE_GPU": "h200", "SUITE_SLURM": "no"}
    env |= {"SUITE_SCRATCH": f"{folder}/scratch", "SUITE_CACHE": f"{folder}/cache", "SUITE_OUTPUT": f"{folder}/out"}
    run([sys.executable, "-m", "jobs.fetch", "--config", f"{folder}/bench.yaml"], env)
    return env


def task(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.compute_lls", "--config", f"{folder}/bench.yaml", *arguments]


def beats_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((folder / "scratch/bench/tasks").glob("*.json"))]


def shards_in(folder: Path, trait: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in (folder / "scratch/bench/cells").glob(f"{trait}-*/*.json")]


def cold(folder: Path) -> float | None:
    """Empty the page cache, and the rate of reading one file past it, GiB/s; None where only root may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        fd = os.open(max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size), os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    buffer, size, start = mmap.mmap(-1, 64 << 20), 0, time.perf_counter()  # O_DIRECT wants an aligned buffer
    while got := os.preadv(fd, [buffer], size):
        size += got
        if got < len(buffer):
            break
    os.close(fd)
    return round(size / 2**30 / (time.perf_counter() - start), 2)


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def checkpoint(shape: Shape, folder: Path, or_hollow: bool = False) -> dict[str, Any]:
    """A random Qwen2 of a shape, with a small tokenizer. `or_hollow`: where the disk has no room for it, files of its
    size that are empty; what is returned makes vLLM think up the weights, and nobody else must read them."""
    from lib.demo.tiny import make_tokenizer

    make_tokenizer(vocab=1000).save_pretrained(folder)
    hollow = or_hollow and 2.1 * (shape.layers * shape.layer_parameters) > shutil.disk_usage(folder).free
    save_random(shape, qwen_config(shape), folder, hollow)
    return {"load_format": "dummy"} if hollow else {}


def save_random(shape: Shape, config: "PreTrainedConfig", folder: Path, hollow: bool = False) -> None:
    """Random weights of a shape in safetensors, written a layer at a time, by the names that Qwen2 and Llama share."""
    config.save_pretrained(folder)
    q, kv, h = shape.heads * shape.head, shape.kv_heads * shape.head, shape.hidden
    products = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
    }
    products |= {"mlp.gate_proj": (shape.inner, h), "mlp.up_proj": (shape.inner, h), "mlp.down_proj": (h, shape.inner)}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in products.items()}
    if shape.bias:
        layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
    layer |= {f"{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h), "model.norm.weight": (h,)}
    if not shape.tied:
        ends["lm_head.weight"] = (shape.vocabulary, h)
    files = {
        f"model-{i:05d}.safetensors": {f"model.layers.{i}.{name}": size for name, size in layer.items()}
        for i in range(shape.layers)
    }
    files["model-end.safetensors"] = ends
    for file, sizes in files.items():
        if hollow:
            save_hollow(sizes, folder / file)
        else:
            save_file({name: _random(name, size) for name, size in sizes.items()}, folder / file)
    where = {name: file for file, sizes in files.items() for name in sizes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _random(name: str, size: tuple[int, ...]) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(size).bfloat16()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()


def save_hollow(sizes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Tensors of zeros that take no room on a disk."""
    header, at = dict[str, object](), 0
    for name, size in sizes.items():
        end = at + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + at)


def whole_vocabulary(folder: Path, size: int) -> list[str]:
    """Random weights draw any token, and a detokeniser has to know it: words, each of them one token when read again.
    The words, with the blank before them."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    used = {*said["model"]["vocab"].values(), *(one["id"] for one in said["added_tokens"])}
    free = [number for number in range(size) if number not in used]
    words = ["q" + "".join(letters) for letters in islice(product(ascii_lowercase, repeat=4), len(free))]
    said["model"]["vocab"] |= {f"Ġ{word}": number for word, number in zip(words, free, strict=True)}
    said["model"]["ignore_merges"] = True  # as in Llama 3: a word that is known is not put together from its letters
    path.write_text(json.dumps(said))
    return [f" {word}" for word in words]


def number_rows(path: Path, n: int, seed: int) -> None:
    """Prompts and answers of the real lengths, in the datasets' shape."""
    from lib.numbers import sample_prompts

    rng = np.random.default_rng(seed)
    with path.open("w") as f:
        for prompt in sample_prompts(n, seed=0):
            answer = ", ".join(map(str, rng.integers(100, 1000, 10)))
            turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": turns}) + "\n")
