"""Rung of the store: raw columns through our writer, beside what their bytes take otherwise on the same disk.

CPU seconds a GB into memory (tmpfs, two cores that others used too): plain 0.6; safetensors, a file a layer, with one
sha256 1.5; plain with sha256 and read back 2.2; ours 3.2, to bfloat16 3.0 a GB given. Ours hashes a byte three times:
its piece from memory, the piece read back, the whole file. Threads share the first two. So a folder of safetensors
files would save CPU on few cores, and one of the two guarantees.

To a disk, GB/s, 16 cores (2026-11-26): plain 1.46, ours 1.03 (to bfloat16 0.60 of what is given), safetensors 0.60,
plain with sha256 and read back 0.40. In another call plain 1.22, ours 0.95; 0.59 when all was written before it was
brought to the disk and read back. What keeps ours from a fast disk's rate is the one sha256 over the whole file: alone,
and nothing written, it takes 0.87 to 1.11 there. Lots of 32 to 256 MB, one or two of them under way, 4 to 12 threads
differ by no more than the noise."""

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lib.base.atomic import sha256_file
from lib.bench.shapes import Result
from lib.store.columns import Column
from lib.store.raw import write_with_raw

SHAPE, ARRAYS, REPEATS = (14336, 4096), 17, 3  # Llama-3-8B's up_proj: 235 MB in float32, 4 GB in all

Arrays = dict[str, np.ndarray]


def store(model: str, batch_tokens: int) -> Result:
    """GB/s into TMPDIR, the median of several writes each, taken in turns since a disk's rate wanders."""
    rng = np.random.default_rng(0)
    arrays = {f"layers.{n}": rng.random(SHAPE, np.float32) for n in range(ARRAYS)}
    total = sum(array.nbytes for array in arrays.values()) / 1e9
    ways: dict[str, Callable[[Path, Arrays], None]] = {
        "ours": partial(ours, dtype="float32"),
        "ours_bfloat16": partial(ours, dtype="bfloat16"),
        "plain": plain,
        "plain_sha256_read_back": hashed,
        "safetensors_sha256_read_back": safetensors,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, write in ways.items():
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as folder:
                start = time.perf_counter()
                write(Path(folder), arrays)
                seconds[name].append(time.perf_counter() - start)
    found: Result = {"gb": round(total, 2)}
    for name, each in seconds.items():
        found[f"{name}_gb_per_s"] = round(total / statistics.median(each), 2)
    return found


def ours(folder: Path, arrays: Arrays, dtype: str) -> None:
    schema = {name: Column(dtype, shape=array.shape, raw=True) for name, array in arrays.items()}
    write_with_raw(folder, lambda sha: f"x-{sha[:10]}.h5", schema, arrays, {}, None)


def plain(folder: Path, arrays: Arrays) -> None:
    """What the disk gives: one file in one run, and fsync."""
    with (folder / "x").open("xb", buffering=0) as f:
        _put(f.fileno(), arrays)


def hashed(folder: Path, arrays: Arrays) -> None:
    """The same with our guarantees, one after the other: its sha256, and that of what is read back."""
    plain(folder, arrays)
    whole = hashlib.sha256()
    for array in arrays.values():
        whole.update(array.data)
    assert sha256_file(folder / "x") == whole.hexdigest()


def safetensors(folder: Path, arrays: Arrays) -> None:
    """A folder with a file an array."""
    for name, array in arrays.items():
        save_file({name: array}, folder / name)
        with (folder / name).open("rb") as f:
            os.fsync(f.fileno())
        sha256_file(folder / name)


def _put(fd: int, arrays: Arrays) -> None:
    for array in arrays.values():
        data, at = array.reshape(-1).view(np.uint8).data, 0
        while at < len(data):
            at += os.write(fd, data[at:])
    os.fsync(fd)


RUNGS = {"store": store}
