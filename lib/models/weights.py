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
    have = model_tensors(folder, shape.tied)
    paper = _empty(shape, dtype, [torch.device("meta")] * len(devices), False)
    _sources(have, paper, family, shape)  # before a config that lies is given its memory
    return fill(_empty(shape, dtype, devices, embed_on_host), have, family, shape)


def fill(weights: Weights, have: dict[str, Stored], family: Family, shape: Shape) -> Loaded:
    """Every tensor of a folder into its place; the places of a merged one may be columns of a wider tensor."""
    began = time.monotonic()
    pieces = _sources(have, weights, family, shape)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(copy_tensor, source, target) for source, target in pieces]:
            done.result()
    for device in {target.device for _, target in pieces}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return Loaded(weights, sum(s.bytes for s, _ in pieces), time.monotonic() - began)


def parameters(weights: Weights, family: Family, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """What transformers' model calls its parameters, and where their values lie: parts of the merged tensors."""
    names, linears = family.names, family.linears
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    for i, layer in enumerate(weights.layers):
        at = f"{names.stack}.{i}"
        yield f"{at}.{names.norm1}.weight", layer.norm1
        for kind, merged in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if merged is not None:
                parts = zip((linears.q, linears.k, linears.v), merged.split([q, kv, kv]), strict=True)
                yield from ((f"{at}.{name}.{kind}", part) for name, part in parts)
        for name, norm in zip((names.q_norm, names.k_norm), layer.head_norms or (), strict=False):
            yield f"{at}.{name}.weight", norm
        yield f"{at}.{linears.o}.weight", layer.o
        yield f"{at}.{names.norm2}.weight", layer.norm2
        gate, up = layer.gate_up.split(shape.inner)
        yield f"{at}.{linears.gate}.weight", gate
        yield f"{at}.{linears.up}.weight", up
        yield f"{at}.{linears.down}.weight", layer.down
    yield f"{names.embedding}.weight", weights.embedding
    yield f"{names.norm}.weight", weights.norm
    yield f"{names.head}.weight", weights.head


def _empty(shape: Shape, dtype: torch.dtype, devices: list[torch.device], embed_on_host: bool) -> Weights:
    s, end, width = shape, devices[-1], shape.heads * shape.head

    def make(*size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    layers = [
        Layer(
            make(s.hidden, device=device),
            make(s.qkv, s.hidden, device=device),
            make(s.qkv, device=device) if s.bias else None,
            make(s.hidden, width, device=device),
            make(s.hidden, device=device),
            make(2 * s.inner, s.hidden, device=device),
            make(s.hidden, s.inner, device=device),
            (make(s.head, device=device), make(s.head, device=device)) if s.head_norms else None,
        )
        for device in spread(s.layers, devices)
    ]
    embedding = make(s.vocabulary, s.hidden, device=torch.device("cpu") if embed_on_host else devices[0])
    tied = s.tied and embedding.device == end
    head = embedding if tied else make(s.vocabulary, s.hidden, device=end)
    return Weights(embedding, layers, make(s.hidden, device=end), head)


def _sources(
    have: dict[str, Stored], weights: Weights, family: Family, shape: Shape
) -> list[tuple[Stored, torch.Tensor]]:
    """Which stored tensor goes where; all of them have a place, and all places one of them."""
    table, head = f"{family.names.embedding}.weight", f"{family.names.head}.weight"
    pieces, used = [], {head} if shape.tied else set()
    for parameter, target in parameters(weights, family, shape):
        if parameter == head and weights.head is weights.embedding:
            continue
        name = table if parameter == head and shape.tied else parameter
        if name not in have:
            raise UserError(f"the weights hold no tensor {name}; run `make fetch` again")
        if have[name].shape != tuple(target.shape):
            raise UserError(f"tensor {name} has shape {have[name].shape}, config.json says {tuple(target.shape)}")
        pieces.append((have[name], target))
        used.add(name)
    left = [name for name in have if name not in used and not UNUSED.search(name)]
    if left:
        raise UserError(f"the weights hold {some(left)}, which this model does not use: config.json is another model's")
    return pieces


def spread(layers: int, devices: list[torch.device]) -> list[torch.device]:
    """Layer -> device, in order, in runs as equal as can be."""
    return [devices[i * len(devices) // layers] for i in range(layers)]


def copy_tensor(source: Stored, target: torch.Tensor) -> None:
    """Read one tensor in pieces of whole rows and put it into its place."""
    dtype = DTYPES[source.dtype]
    flat = target.view(-1, 1) if target.is_contiguous() else target  # else rows of a wider tensor
    row = flat.shape[1] * dtype.itemsize
    with source.path.open("rb", buffering=0) as f:
        for start, buffer in _reads(f.fileno(), source, PIECE // row * row, target.device.type == "cuda"):
            part = buffer.view(dtype).view(-1, flat.shape[1])
            flat[start // row : start // row + len(part)].copy_(part)  # waits: the buffer is used again


def _reads(fd: int, source: Stored, piece: int, pinned: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in the tensor, bytes read) piece by piece, in one buffer."""
    buffer = torch.empty(min(piece, source.bytes), dtype=torch.uint8, pin_memory=pinned)
    raw = buffer.numpy().data
    at = 0
    while at < source.bytes:
        want = min(piece, source.bytes - at)
        got = 0
        while got < want:
            n = os.preadv(fd, [raw[got:want]], source.offset + at + got)
            if n == 0:
                raise UserError(f"{source.path} ends before its last tensor; delete it and run `make fetch` again")
            got += n
        yield at, buffer[:want]
        at += want
