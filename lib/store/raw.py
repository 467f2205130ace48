"""Files with raw columns: tens of GB, never built in memory. HDF5 says where an array belongs, threads write it there.

The structure of the file is made in memory first, with room for the arrays that stays empty. Then array after array is
asked for, rounded if it is to be bfloat16, and written to its place; the structure follows. What was written is brought
to the disk, read back and compared with hashes that were taken from memory, while more is written. Then the file is
renamed: as for small files, whole or absent."""

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

from lib.base.atomic import check_room, sha256_file, temporary
from lib.store.bf16 import Rounding, from_bfloat16, rounding, to_bfloat16
from lib.store.columns import Column, Schema, Values, check_raw, fill
from lib.store.sketch import Sketch

PIECE = 1 << 20  # values written and hashed at once
BLOCK = 1 << 16  # values rounded at once
SETTLED = 32  # pieces, 128 MiB at most, that are brought to the disk and read back together
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
        tmp.open("x+b", buffering=0) as out,
        ThreadPoolExecutor(THREADS) as pool,
        ThreadPoolExecutor(1) as beside,
        h5py.File(sketch, "w", libver=("v110", "v110"), **ALIGN) as f,
    ):
        fill(f, schema, columns, attributes)
        places = [_reserve(f, key, c, (*lead, *c.shape)) for key, c in schema.items() if c.raw]
        check_room(folder / name(""), f.id.get_filesize())
        if not any(place.rounded for place in places):
            f.close()  # nothing is to be noted in it any more
        file = RawFile(out.fileno(), pool, beside)
        sha = _put_arrays(file, f, sketch, places, _arrays(places, columns))
        f.close()
        _put_structure(file, sketch, places)
        file.finish(sketch.size)
        sha = sha or sha256_file(tmp)
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


class RawFile:
    """Stretches of a file: those that were written are settled, on the disk and read back, while more are written."""

    def __init__(self, fd: int, pool: ThreadPoolExecutor, beside: ThreadPoolExecutor) -> None:
        self.fd, self.pool, self.beside = fd, pool, beside
        self.written: list[Stretch] = []
        self.settled = 0  # so many of them are, or soon
        self.settling = beside.submit(self._settle, 0, 0)

    def put(self, place: Place, array: np.ndarray) -> Iterator[tuple[Rounding, memoryview]]:
        """Each piece of an array once it is written."""
        for stretch, cost, data in _in_order(self.pool, partial(_put, self.fd, place), _parts(array)):
            self.add(stretch)
            yield cost, data

    def add(self, written: Stretch) -> None:
        self.written.append(written)
        if len(self.written) - self.settled == SETTLED:
            self._go_on()

    def finish(self, size: int) -> None:
        """All of it is there, once, as it was in memory."""
        self._go_on()
        self.settling.result()
        os.fsync(self.fd)
        ends = [0]
        for stretch in sorted(self.written, key=lambda s: s.offset):
            if stretch.offset != ends[-1]:
                raise OSError(errno.EIO, "the pieces leave a hole or overlap")
            ends.append(stretch.offset + stretch.length)
        if not ends[-1] == size == os.fstat(self.fd).st_size:
            raise OSError(errno.EIO, "the file has another size than what was written")

    def _go_on(self) -> None:
        """Waits for those before: only so much is in memory and not yet on the disk."""
        self.settling.result()
        self.settling = self.beside.submit(self._settle, self.settled, len(self.written))
        self.settled = len(self.written)

    def _settle(self, start: int, stop: int) -> None:
        os.fdatasync(self.fd)
        for _ in _in_order(self.pool, partial(_read_back, self.fd), self.written[start:stop]):
            pass


def _put_arrays(
    file: RawFile, f: h5py.File, sketch: Sketch, places: list[Place], arrays: Iterator[tuple[Place, np.ndarray]]
) -> str:
    """Write all arrays. The sha256 of the file keeps pace where all that stands between them is known already; it is
    empty where it is not: a rounded array's errors are noted before the array, and known after it."""
    known = not f and all(a.offset < b.offset for a, b in pairwise(places))
    whole, end = hashlib.sha256(), 0
    for place, array in arrays:
        if known:
            whole.update(sketch.cut(end, place.offset))
        end = place.offset + place.bytes
        costs = []
        for cost, data in file.put(place, array):
            costs.append(cost)
            if known:
                whole.update(data)
        del array, data
        if place.rounded:
            _note(f[place.name], costs)
    if known:
        whole.update(sketch.cut(end, sketch.size))
    return whole.hexdigest() if known else ""


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


def _put_structure(file: RawFile, sketch: Sketch, places: list[Place]) -> None:
    """All that lies before, between and behind the arrays."""
    starts = [0, *(p.offset + p.bytes for p in places)]
    stops = [*(p.offset for p in places), sketch.size]
    for start, stop in zip(sorted(starts), sorted(stops), strict=True):
        if start < stop:
            file.add(_write(file.fd, memoryview(sketch.cut(start, stop)), start))


def _write(fd: int, data: memoryview, offset: int) -> Stretch:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], offset + at)
    return Stretch(offset, len(data), hashlib.sha256(data).digest())


def _read_back(fd: int, piece: Stretch) -> None:
    data = bytearray(piece.length)
    view, at = memoryview(data), 0
    while at < piece.length and (n := os.preadv(fd, [view[at:]], piece.offset + at)):
        at += n
    if hashlib.sha256(data).digest() != piece.sha256:
        raise OSError(errno.EIO, "what was read back differs from what was written")


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
