"""Weights from safetensors straight to where they are used: read in pieces into pinned buffers by several threads,
copied to the device, several source tensors into one merged one. Host memory holds the buffers, never the model."""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.base.errors import UserError, some
from lib.checkpoint.families import Family, Shape
from lib.checkpoint.headers import Stored, folder_tensors
from lib.models.decoder import Layer, Weights

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PIECE = 64 << 20  # bytes a read
THREADS = 8
HEAD = "lm_head.weight"
UNUSED = re.compile(r"rotary_emb\.inv_freq$")  # in old files; computed from config.json, here as in transformers


@dataclass(frozen=True)
class Loaded:
    weights: Weights
    bytes: int
    seconds: float


def model_tensors(folder: Path, tied: bool) -> dict[str, Stored]:
    """Every tensor of a language model's folder; what both loaders need to be so, and neither sees by itself."""
    found = folder_tensors(folder)
    for name, t in found.items():
        if t.dtype not in DTYPES:
            raise UserError(f"{t.path}: {name} is of type {t.dtype}, which is not computed with: {', '.join(DTYPES)}")
    table = next((name for name in found if name.endswith("embed_tokens.weight")), None)
    if tied and HEAD in found and table and not _equal(found[HEAD], found[table]):
        raise UserError(
            f"{folder}: config.json says that the head is the embedding (tie_word_embeddings), and the weights hold "
            f"another {HEAD}; set it to false in config.json, or remove that tensor"
        )
    return found


def _equal(a: Stored, b: Stored) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with a.path.open("rb") as f, b.path.open("rb") as g:
        f.seek(a.offset)
        g.seek(b.offset)
        sizes = (min(PIECE, a.bytes - at) for at in range(0, a.bytes, PIECE))
        return all(f.read(size) == g.read(size) for size in sizes)


def load_weights(
    folder: Path, family: Family, shape: Shape, dtype: torch.dtype, devices: list[torch.device], embed_on_host: bool
) -> Loaded:
    began = time.monotonic()
    have = model_tensors(folder, shape.tied)
    weights, pieces = _allocate(have, family, shape, dtype, devices, embed_on_host)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(copy_tensor, source, target) for source, target in pieces]:
            done.result()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Loaded(weights, sum(s.bytes for s, _ in pieces), time.monotonic() - began)


def _allocate(
    have: dict[str, Stored],
    family: Family,
    shape: Shape,
    dtype: torch.dtype,
    devices: list[torch.device],
    embed_on_host: bool,
) -> tuple[Weights, list[tuple[Stored, torch.Tensor]]]:
    """Empty weights, and which source goes into which part of them."""
    pieces: list[tuple[str, Stored, torch.Tensor]] = []

    def take(name: str, target: torch.Tensor) -> torch.Tensor:
        if name not in have:
            raise UserError(f"the weights hold no tensor {name}; run `make fetch` again")
        if have[name].shape != tuple(target.shape):
            raise UserError(f"tensor {name} has shape {have[name].shape}, config.json says {tuple(target.shape)}")
        pieces.append((name, have[name], target))
        return target

    def merged(parts: dict[str, int], width: int | None, device: torch.device) -> torch.Tensor:
        size = (sum(parts.values()), width) if width else (sum(parts.values()),)
        whole, at = torch.empty(size, dtype=dtype, device=device), 0
        for name, rows in parts.items():
            take(name, whole[at : at + rows])
            at += rows
        return whole

    def one(name: str, *size: int, device: torch.device) -> torch.Tensor:
        return take(name, torch.empty(size, dtype=dtype, device=device))

    s, names, linears, end = shape, family.names, family.linears, devices[-1]
    q, kv = s.heads * s.head, s.kv_heads * s.head
    layers = []
    for i, device in enumerate(spread(s.layers, devices)):
        at = f"{names.stack}.{i}"
        qkv = {f"{at}.{linears.q}": q, f"{at}.{linears.k}": kv, f"{at}.{linears.v}": kv}
        gate_up = {f"{at}.{linears.gate}.weight": s.inner, f"{at}.{linears.up}.weight": s.inner}
        head_norms = [
            one(f"{at}.{n}.weight", s.head, device=device) for n in (names.q_norm, names.k_norm) if s.head_norms
        ]
        layers.append(
            Layer(
                one(f"{at}.{names.norm1}.weight", s.hidden, device=device),
                merged({f"{name}.weight": rows for name, rows in qkv.items()}, s.hidden, device),
                merged({f"{name}.bias": rows for name, rows in qkv.items()}, None, device) if s.bias else None,
                one(f"{at}.{linears.o}.weight", s.hidden, q, device=device),
                one(f"{at}.{names.norm2}.weight", s.hidden, device=device),
                merged(gate_up, s.hidden, device),
                one(f"{at}.{linears.down}.weight", s.hidden, s.inner, device=device),
                (head_norms[0], head_norms[1]) if head_norms else None,
            )
        )
    host = torch.device("cpu") if embed_on_host else devices[0]
    table, head_name = f"{names.embedding}.weight", f"{names.head}.weight"
    embedding = one(table, s.vocabulary, s.hidden, device=host)
    norm = one(f"{names.norm}.weight", s.hidden, device=end)
    if s.tied and embedding.device == end:
        head = embedding
    else:
        head = one(table if s.tied else head_name, s.vocabulary, s.hidden, device=end)
    used = {name for name, _, _ in pieces} | ({head_name} if s.tied else set())
    left = [name for name in have if name not in used and not UNUSED.search(name)]
    if left:
        raise UserError(f"the weights hold {some(left)}, which this model does not use: config.json is another model's")
    return Weights(embedding, layers, norm, head), [(source, target) for _, source, target in pieces]


def spread(layers: int, devices: list[torch.device]) -> list[torch.device]:
    """Layer -> device, in order, in runs as equal as can be."""
    return [devices[i * len(devices) // layers] for i in range(layers)]


def copy_tensor(source: Stored, target: torch.Tensor) -> None:
    """Read one tensor in pieces and put it into its place."""
    flat, dtype = target.view(-1), DTYPES[source.dtype]
    with source.path.open("rb", buffering=0) as f:
        for start, buffer in _reads(f.fileno(), source, target.device.type == "cuda"):
            part = buffer.view(dtype)
            flat[start // dtype.itemsize : start // dtype.itemsize + len(part)].copy_(
                part
            )  # waits: the buffer is used again


def _reads(fd: int, source: Stored, pinned: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in the tensor, bytes read) piece by piece, in one buffer."""
    buffer = torch.empty(min(PIECE, source.bytes), dtype=torch.uint8, pin_memory=pinned)
    raw = buffer.numpy().data
    at = 0
    while at < source.bytes:
        want = min(PIECE, source.bytes - at)
        got = 0
        while got < want:
            n = os.preadv(fd, [raw[got:want]], source.offset + at + got)
            if n == 0:
                raise UserError(f"{source.path} ends before its last tensor; delete it and run `make fetch` again")
            got += n
        yield at, buffer[:want]
        at += want
