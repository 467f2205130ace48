"""Files with raw columns: tens of GB, never built in memory. HDF5 says where an array belongs, threads write it there.

The structure of the file is made in memory first, with room for the arrays that stays empty. Then array after array is
asked for, rounded if it is to be bfloat16, and written to its place; the structure follows. All is fsynced, read back,
compared with hashes that were taken from memory, and renamed: as for small files, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np

from lib.base.atomic import check_room, temporary
from lib.store.bf16 import Rounding, from_bfloat16, rounding, to_bfloat16
from lib.store.columns import Column, Schema, Values, check_raw, fill
from lib.store.sketch import Sketch

PIECE = 1 << 20  # values written and hashed at once
BLOCK = 1 << 16  # values rounded at once
ALIGN = {"alignment_threshold": 1 << 16, "alignment_interval": 4096}  # threads then share no page of the file
THREADS = min(8, len(os.sched_getaffinity(0)))
T = TypeVar("T")
R = TypeVar("R")


class Written(NamedTuple):
    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where a raw column lies."""

    name: str
    column: Column
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return self.column.stored.itemsize * prod(self.shape)

    @property
    def rounded(self) -> bool:
        return self.column.dtype == "bfloat16"


@dataclass(frozen=True)
class Stretch:
    """A run of bytes of the file, and the hash that it must have."""

    offset: int
    length: int
    sha256: bytes


def write_with_raw(
    folder: Path,
    name: Callable[[str], str],
    schema: Schema,
    columns: Mapping[str, Values],
    attributes: dict[str, Any],
    rows: int | None,
) -> Written:
    """Write one file into `folder`; its name is made from its sha256. `rows`: raw columns have so many; None: they are
    sums over rows, without that axis.

    A raw column may be given as a function that returns its array: each is called once, on a thread, in the schema's
    order, one array ahead of the writing. So at most two are in memory, and a device can compute while they are stored.
    """
    lead = () if rows is None else (rows,)
    sketch = Sketch()
    with (
        temporary(folder / name("")) as tmp,
        tmp.open("xb") as out,
        ThreadPoolExecutor(THREADS) as pool,
        h5py.File(sketch, "w", libver=("v110", "v110"), **ALIGN) as f,
    ):
        fill(f, schema, columns, attributes)
        places = [_reserve(f, key, c, (*lead, *c.shape)) for key, c in schema.items() if c.raw]
        check_room(folder / name(""), f.id.get_filesize())
        if not any(place.rounded for place in places):
            f.close()  # nothing is to be noted in it any more
        pieces, sha = _put_arrays(out.fileno(), f, sketch, places, _arrays(places, columns), pool)
        f.close()
        pieces += _put_structure(out.fileno(), sketch, places)
        os.fsync(out.fileno())
        sha = _read_back(tmp, sorted(pieces, key=lambda p: p.offset), sketch.size, pool, sha)
        path = folder / name(sha)
        tmp.replace(path)
    return Written(path, sha, sketch.size)


def read_array(dataset: h5py.Dataset, row: int | None = None) -> np.ndarray:
    """A dataset, or one row of it, as float32; bfloat16 is widened, exactly."""
    values = dataset[() if row is None else row]
    if dataset.attrs.get("dtype") == "bfloat16":
        return from_bfloat16(values)
    return values.astype(np.float32, copy=False)


def _reserve(f: h5py.File, name: str, column: Column, shape: tuple[int, ...]) -> Place:
    """Room for an array in one run of the file, which HDF5 itself never writes to."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    dataset = f.create_dataset(name, shape, column.stored.newbyteorder("<"), dcpl=early, fill_time="never")
    if column.dtype == "bfloat16":
        dataset.attrs["dtype"] = "bfloat16"
        _note(dataset, [])  # now, so that it has its place before the arrays
    return Place(name, column, shape, dataset.id.get_offset())


def _note(dataset: h5py.Dataset, costs: list[Rounding]) -> None:
    cost = sum(costs, Rounding())
    dataset.attrs["rounding_max_relative"] = cost.max_relative
    dataset.attrs["rounding_l1_relative"] = cost.l1_relative


def _put_arrays(
    fd: int,
    f: h5py.File,
    sketch: Sketch,
    places: list[Place],
    arrays: Iterator[tuple[Place, np.ndarray]],
    pool: ThreadPoolExecutor,
) -> tuple[list[Stretch], str]:
    """Write all arrays. The sha256 of the file keeps pace where all that stands between them is known already; it is
    empty where it is not: a rounded array's errors are noted before the array, and known after it."""
    pieces: list[Stretch] = []
    known = not f and all(a.offset < b.offset for a, b in pairwise(places))
    whole, end = hashlib.sha256(), 0
    for place, array in arrays:
        if known:
            whole.update(sketch.cut(end, place.offset))
        end = place.offset + place.bytes
        costs = []
        for piece, cost, data in _in_order(pool, partial(_put, fd, place), _parts(array)):
            pieces.append(piece)
            costs.append(cost)
            if known:
                whole.update(data)
        del array, data
        if place.rounded:
            _note(f[place.name], costs)
    if known:
        whole.update(sketch.cut(end, sketch.size))
    return pieces, whole.hexdigest() if known else ""


def _arrays(places: list[Place], columns: Mapping[str, Values]) -> Iterator[tuple[Place, np.ndarray]]:
    """Each array flat, while the next one is fetched."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(_ask, places[0], columns)
        for number, place in enumerate(places):
            array = coming.result()
            if number + 1 < len(places):
                coming = ahead.submit(_ask, places[number + 1], columns)
            yield place, array
            del array


def _ask(place: Place, columns: Mapping[str, Values]) -> np.ndarray:
    values = columns[place.name]
    array = values() if callable(values) else np.asarray(values)
    check_raw(place.name, array, place.shape)
    return np.ascontiguousarray(array, np.float32).reshape(-1)


def _parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((start, array[start : start + PIECE]) for start in range(0, len(array), PIECE))


def _put(fd: int, place: Place, part: tuple[int, np.ndarray]) -> tuple[Stretch, Rounding, memoryview]:
    """Round where that is asked for, hash, write to its place in the file."""
    start, values = part
    stored, cost = _rounded(values) if place.rounded else (values, Rounding())
    data = stored.view(np.uint8).data
    return _write(fd, data, place.offset + start * stored.itemsize), cost, data


def _rounded(values: np.ndarray) -> tuple[np.ndarray, Rounding]:
    """As bfloat16, in blocks that stay in a core's cache: three times as fast as in one go."""
    stored, cost = np.empty(len(values), np.uint16), Rounding()
    for at in range(0, len(values), BLOCK):
        block, bits = values[at : at + BLOCK], stored[at : at + BLOCK]
        bits[:] = to_bfloat16(block)
        cost += rounding(block, bits)
    return stored, cost


def _put_structure(fd: int, sketch: Sketch, places: list[Place]) -> list[Stretch]:
    """All that lies before, between and behind the arrays."""
    starts = [0, *(p.offset + p.bytes for p in places)]
    stops = [*(p.offset for p in places), sketch.size]
    gaps = zip(sorted(starts), sorted(stops), strict=True)
    return [_write(fd, memoryview(sketch.cut(start, stop)), start) for start, stop in gaps if start < stop]


def _write(fd: int, data: memoryview, offset: int) -> Stretch:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], offset + at)
    return Stretch(offset, len(data), hashlib.sha256(data).digest())


def _read_back(path: Path, pieces: list[Stretch], size: int, pool: ThreadPoolExecutor, sha: str) -> str:
    """The sha256 of the whole file, once every byte of it is what was in memory; `sha` where that one is known."""
    whole, at = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as f:
        for piece, data in zip(pieces, _in_order(pool, partial(_read, f.fileno()), pieces), strict=True):
            if piece.offset != at:
                raise OSError(errno.EIO, "the pieces leave a hole", str(path))
            at += len(data)
            if not sha:
                whole.update(data)
        if at != size or os.fstat(f.fileno()).st_size != size:
            raise OSError(errno.EIO, "the file has another size than what was written", str(path))
    return sha or whole.hexdigest()


def _read(fd: int, piece: Stretch) -> bytearray:
    data = bytearray(piece.length)
    view, at = memoryview(data), 0
    while at < piece.length and (n := os.preadv(fd, [view[at:]], piece.offset + at)):
        at += n
    if hashlib.sha256(data).digest() != piece.sha256:
        raise OSError(errno.EIO, "what was read back differs from what was written")
    return data


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items; only so many at once that memory stays bounded."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
