"""Scores of every weight, read piece by piece: from merged attribution files, from arrays, or computed from weights.

Suffixes: J outputs, I inputs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch

from lib.attribution.wanda import weight_scores
from lib.base.errors import UserError
from lib.pruning.linears import Linear
from lib.pruning.together import check_known

PIECE = 1 << 21  # values read at once by a thread: 8 MB
THREADS = min(8, len(os.sched_getaffinity(0)))


class Scores(Protocol):
    """Of one linear layer; the lowest are pruned first."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start] of the flat scores; called by several threads."""
        ...


@dataclass(frozen=True)
class Term:
    """An array in a file, times a factor."""

    path: Path
    offset: int
    factor: float


@dataclass(frozen=True)
class Stored:
    """A sum of terms, as of sums over samples that become means, or of one set's means minus another's."""

    name: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    absolute: bool

    def read(self, start: int, stop: int) -> np.ndarray:
        total = _floats(self.terms[0], start, stop)
        for term in self.terms[1:]:
            total += _floats(term, start, stop)
        return np.abs(total, out=total) if self.absolute else total


@dataclass(frozen=True)
class Held:
    """An array in memory; ranked as float32."""

    name: str
    values_JI: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values_JI.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values_JI.reshape(-1)[start:stop].astype(np.float32, copy=False)


@dataclass(frozen=True)
class Wanda:
    """|W| times the norm of each input, from the weights where they lie; with norms of 1, magnitude."""

    name: str
    weight_JI: torch.Tensor
    norm_I: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_JI.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        width = self.weight_JI.shape[1]
        first, last = start // width, -(-stop // width)
        part = weight_scores(self.weight_JI[first:last].detach(), self.norm_I).reshape(-1)
        return part[start - first * width : stop - first * width].cpu().numpy().astype(np.float32, copy=False)

    def whole(self) -> torch.Tensor:
        return weight_scores(self.weight_JI, self.norm_I)


def stored_scores(
    files: Sequence[tuple[Path, float]], kind: str, names: Iterable[str], absolute: bool = False
) -> list[Stored]:
    """Of layers in merged.h5 of attribution (level weight), each file's sums times its factor: 1 / samples for a mean,
    -1 / samples for one to be subtracted."""
    found: dict[str, list[tuple[tuple[int, ...], Term]]] = {name: [] for name in names}
    for path, factor in files:
        with _opened(path) as f:
            for name, terms in found.items():
                terms.append(_place(f, path, f"{kind}/{name}", factor))
    for name, terms in found.items():
        if len({shape for shape, _ in terms}) > 1:
            raise UserError(f"{name} has other shapes in {files[0][0]} and the other files: they are not of one model")
    return [Stored(name, some[0][0], tuple(term for _, term in some), absolute) for name, some in found.items()]


def wanda_scores(have: Mapping[str, Linear], norms: Mapping[str, torch.Tensor]) -> list[Wanda]:
    """Of the layers that have input norms (lib.attribution.wanda.norms)."""
    found = []
    for name, norm_I in norms.items():
        check_known(name, have)
        weight_JI = have[name].weight.part
        if len(norm_I) != weight_JI.shape[1]:
            raise UserError(f"{name} has {weight_JI.shape[1]} inputs and {len(norm_I)} norms: they are another model's")
        found.append(Wanda(name, weight_JI, norm_I))
    return found


def whole(scores: Scores, device: torch.device) -> torch.Tensor:
    """All of a layer's scores on a device, float32 [J, I]."""
    if isinstance(scores, Wanda):
        return scores.whole().to(device)
    values = np.empty(prod(scores.shape), np.float32)

    def fill(start: int) -> None:
        values[start : start + PIECE] = scores.read(start, min(start + PIECE, len(values)))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, range(0, len(values), PIECE)))
    return torch.from_numpy(values).view(scores.shape).to(device)


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}); merge it again with `make export-attributions`") from None


def _place(f: h5py.File, path: Path, name: str, factor: float) -> tuple[tuple[int, ...], Term]:
    dataset = f.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path} holds no {name}: attribute that layer with score.level=weight and this kind of scores")
    offset = dataset.id.get_offset()
    if dataset.dtype != np.dtype("<f4") or offset is None:
        raise UserError(f"{path}: {name} is no plain float32 array; merge it again with `make export-attributions`")
    return dataset.shape, Term(path, offset, factor)


def _floats(term: Term, start: int, stop: int) -> np.ndarray:
    """Past h5py, whose calls wait for each other."""
    values = np.empty(stop - start, "<f4")
    view, at = values.data.cast("B"), 0
    with term.path.open("rb", buffering=0) as f:
        while at < len(view) and (n := os.preadv(f.fileno(), [view[at:]], term.offset + start * 4 + at)):
            at += n
    if at < len(view):
        raise UserError(f"{term.path} ends before its arrays; delete it and merge it again")
    if term.factor != 1:
        values *= np.float32(term.factor)
    return values
