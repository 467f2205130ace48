"""Rungs of pruning: 1,000 neurons out of a loaded model and back, and the global threshold against plain reading."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch

from lib.base.atomic import open_file
from lib.bench.llamas import LLAMAS
from lib.bench.shapes import Result
from lib.checkpoint.families import FAMILIES
from lib.models.decoder import Layer, Weights
from lib.pruning.neurons import Pruner
from lib.pruning.scores import THREADS, Stored, stored_scores
from lib.pruning.threshold import find_threshold, masks
from lib.store.columns import Column
from lib.store.raw import write_with_raw

NEURONS, REPEATS = 1000, 20
READ = 8 << 20


def random_weights(model: str, device: torch.device, dtype: torch.dtype) -> Weights:
    """The decoder's merged layers, without embedding and head."""
    layers, hidden, inner, heads, kv, _ = LLAMAS[model]
    width = hidden // heads

    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02)

    def layer() -> Layer:
        qkv = make((heads + 2 * kv) * width, hidden)
        return Layer(
            make(hidden), qkv, None, make(hidden, hidden), make(hidden), make(2 * inner, hidden), make(hidden, inner)
        )

    return Weights(make(1, hidden), [layer() for _ in range(layers)], make(hidden), make(1, hidden))


def neurons(model: str, device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> Result:
    """Seconds of apply and undo, the device waited for; whether every bit came back; launches."""
    device = device or torch.device("cuda")
    weights = random_weights(model, device, dtype)
    layers, _, inner, *_ = LLAMAS[model]
    pruner, random = Pruner(weights, FAMILIES["llama"]), np.random.default_rng(0)
    flat = random.permutation(layers * inner)[:NEURONS]
    chosen = {f"layers.{i}.mlp.up_proj": flat[flat // inner == i] % inner for i in range(layers)}
    before = checksums(weights)
    began = time.perf_counter()
    plan = pruner.prepare(chosen)
    _wait(device)
    found: Result = {"prepare_ms": _ms(time.perf_counter() - began), "launches": 2 * len(plan.edits)}
    seconds: dict[str, list[float]] = {"apply_ms": [], "undo_ms": []}
    for _ in range(REPEATS + 1):
        for name, run in (("apply_ms", lambda: pruner.apply(plan)), ("undo_ms", pruner.undo)):
            began = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    with pruner.applied(plan):
        changed = checksums(weights) != before
    found |= {name: _ms(statistics.median(some[1:])) for name, some in seconds.items()}
    return found | {"neurons": plan.neurons, "changed": changed, "same_bits_after": checksums(weights) == before}


def checksums(weights: Weights) -> list[int]:
    """Of each layer's merged tensors: the sum of their bits, each times its place's own odd number."""
    found = []
    for layer in weights.layers:
        for tensor in (layer.qkv, layer.o, layer.gate_up, layer.down):
            bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
            rows = torch.arange(1, 2 * len(bits), 2, device=bits.device)
            columns = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)
            parts = (
                (part.long() * columns).sum(1) * r for part, r in zip(bits.split(1024), rows.split(1024), strict=True)
            )
            found.append(sum(int(part.sum()) for part in parts))
    return found


def threshold(model: str, layers: Sequence[str] | None = None, folder: str | None = None) -> Result:
    """Half of all scores in files as attribution merges them: GB/s of finding, of applying, and of plain reading."""
    count, hidden, inner, *_ = LLAMAS[model]
    names = list(layers or [f"layers.{i}.mlp.up_proj" for i in range(count)])
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        path = _scores_file(Path(tmp), names, (inner, hidden))
        return of_files(stored_scores([(path, 1.0)], "abs", names))


def of_files(scores: Sequence[Stored], share: float = 0.5) -> Result:
    """On any scores: what they take, beside reading the same bytes and doing nothing with them. Each pass finds in the
    page cache what the one before it left there, the plain one first."""
    total = sum(prod(one.shape) for one in scores)
    size = 4 * sum(prod(one.shape) * len(one.terms) for one in scores)
    read = _seconds(lambda: plain_read(scores))
    plain = size / read / 1e9
    began = time.perf_counter()
    found = find_threshold(scores, int(share * total))
    find, began = time.perf_counter() - began, time.perf_counter()
    zeros = sum(int(np.count_nonzero(mask)) for _, mask in masks(scores, found))
    mask = time.perf_counter() - began
    return {
        "gb": round(size / 1e9, 3),
        "plain_gb_s": round(plain, 2),
        "find_gb_s": round(size / find / 1e9, 2),
        "mask_gb_s": round(size / mask / 1e9, 2),
        "threads": THREADS,
        "zeros_right": zeros == int(share * total),
    }


def plain_read(scores: Sequence[Stored]) -> None:
    """Every byte of the scores, by as many threads."""
    places = [
        (term.path, term.offset + at, min(READ, 4 * prod(one.shape) - at))
        for one in scores
        for term in one.terms
        for at in range(0, 4 * prod(one.shape), READ)
    ]

    def read(place: tuple[Path, int, int]) -> None:
        path, offset, size = place
        with open_file(path) as f:
            assert os.preadv(f.fileno(), [bytearray(size)], offset) == size

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, places))


def _scores_file(folder: Path, names: Sequence[str], shape: tuple[int, int]) -> Path:
    random = np.random.default_rng(0)

    def make() -> np.ndarray:
        return np.square(random.standard_normal(shape, np.float32))

    schema = {f"abs/{name}": Column("float32", shape=shape, raw=True) for name in names}
    return write_with_raw(folder, lambda sha: "scores.h5", schema, dict.fromkeys(schema, make), {}, None).path


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


RUNGS: dict[str, Callable[[str, int], Result]] = {
    "prune": lambda model, batch_tokens: neurons(model),
    "threshold": lambda model, batch_tokens: threshold(model),
}
