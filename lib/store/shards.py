"""Shards of a cell: a range of rows in one HDF5 file named by its content, and a marker that vouches for it.

    <cell>/00000000-00001024-1f3a5c7e9b.h5     the data; the last part of the name is from its sha256
    <cell>/00000000-00001024.json              the marker: digest, sha256, size, who made it, the kernel's facts

"Done" means: the marker is there, it carries the cell's digest, and its file has the size and sha256 that it says, and,
wherever bytes are read, holds the rows that the marker vouches for.
The data file depends on the rows alone, not on who wrote it or when: two copies of a task that run at once write the
same file, and should they differ (two kinds of GPU), the marker still points at one whole file."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.base.atomic import read_file, remove, sha256_file, write_bytes
from lib.store.columns import Schema, Values, check_columns, present, read_columns, to_hdf5
from lib.store.contents import why_wrong
from lib.store.markers import Bad, Facts, Piece, Vouched, about, look_at, place, understood
from lib.store.raw import Written, write_with_raw

MARKER_NAME = re.compile(r"(\d{8})-(\d{8})\.json")
MOST_ROWS = 10**8  # that a marker's name has room for
FILE_NAME = re.compile(r"(\d{8}-\d{8})-[0-9a-f]+\.h5")


@dataclass(frozen=True)
class Cell:
    """What is resumed by itself: a name, its rows (or steps), and the digest of all that decides its results, which the
    digests of what it reads from are part of: it has an identity before they are done."""

    index: int
    name: str
    rows: int | None  # None: not known before what it reads from is done
    digest: str
    path: Path  # folder of its pieces: <scratch>/<experiment>/cells/<name>-<digest>
    parents: tuple["Cell", ...] = ()

    @property
    def total(self) -> int:
        """Its rows, where they are known."""
        if self.rows is None:
            raise ValueError(f"how many rows {self.spoken} has is not known yet")
        return self.rows

    @property
    def folder(self) -> Path:
        """Of its experiment."""
        return self.path.parent.parent

    @property
    def spoken(self) -> str:
        """Its name among those of all experiments."""
        return f"{self.folder.name}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class VouchedShard(Vouched):
    start: int
    stop: int
    file: str
    unscored: int = 0


@dataclass(frozen=True, kw_only=True)
class Marker(Piece):
    start: int
    stop: int
    unscored: int = 0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def file(self) -> Path:
        return self.data


def commit(
    folder: Path,
    digest: str,
    start: int,
    stop: int,
    schema: Schema,
    columns: Mapping[str, Values],
    *,
    seconds: float = 0.0,
    made: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
    sampled: bool = False,
) -> Marker:
    """Write one shard and then its marker. Only raw columns may be given as functions (see write_with_raw). `sampled`:
    another copy's rows need not be the same, and those that are there first stay."""
    check_columns(schema, columns, stop - start)
    marker = {"digest": digest, "start": start, "stop": stop, **about(seconds, made, facts)}
    name = f"{start:08d}-{stop:08d}"
    file = _write(folder, name, schema, columns, {"digest": digest, "start": start, "stop": stop})
    with h5py.File(file.path, "r", locking=False) as f:  # can it be read back as what it is?
        read_columns(f, schema)
    if "status" in columns:  # in every schema that has one, 0 = the row has a result
        marker["unscored"] = int(np.count_nonzero(present(columns, "status")))
    marker |= {"file": file.path.name, "sha256": file.sha256, "bytes": file.bytes}
    path = folder / f"{name}.json"
    look = partial(_check, digest=digest, deep=True, schema=schema, rows=MOST_ROWS)
    first = place(path, marker, sampled, look)
    if first and (first.adopted or first.retired):
        remove(file.path)
    return first or _marker(path, *understood(path, marker, VouchedShard))


def _marker(path: Path, said: VouchedShard, common: dict[str, Any]) -> Marker:
    return Marker(data=path.parent / said.file, start=said.start, stop=said.stop, unscored=said.unscored, **common)


def _write(
    folder: Path, name: str, schema: Schema, columns: Mapping[str, Values], attributes: dict[str, Any]
) -> Written:
    """A file whose name ends in the first letters of its sha256."""

    def named(sha: str) -> str:
        return f"{name}-{sha[:10]}.h5"

    if any(column.raw for column in schema.values()):
        return write_with_raw(folder, named, schema, columns, attributes, attributes["stop"] - attributes["start"])
    data = to_hdf5(schema, columns, attributes)
    sha = hashlib.sha256(data).hexdigest()
    write_bytes(folder / named(sha), data)
    return Written(folder / named(sha), sha, len(data))


def scan(
    folder: Path, digest: str, deep: bool = False, schema: Schema | None = None, rows: int = MOST_ROWS
) -> tuple[list[Marker], list[Bad]]:
    """The done shards of a cell of so many rows, and the markers that do not hold with the reason. `deep` reads every
    byte and looks at what the file holds: with its schema at every column, else at links and what it says of itself."""
    check = partial(_check, digest=digest, deep=deep, schema=schema, rows=rows)
    done, bad = look_at(folder, MARKER_NAME, check, deep)
    return sorted(done, key=lambda m: (m.start, m.stop)), bad


def _check(path: Path, digest: str, deep: bool, schema: Schema | None, rows: int) -> Marker | str:
    """A marker that holds, or why it does not."""
    try:
        said, common = understood(path, json.loads(read_file(path)), VouchedShard)
    except (OSError, ValueError, RecursionError):
        return "the marker cannot be read"
    if path.stem != f"{said.start:08d}-{said.stop:08d}" or said.start >= said.stop:
        return "its name and its rows differ"
    if said.digest != digest:
        return f"digest {said.digest[:8]} is another experiment's (wanted {digest[:8]})"
    if said.stop > rows:
        return f"the cell has {rows} rows"
    named = FILE_NAME.fullmatch(said.file)
    if not named or named[1] != path.stem:
        return "it points outside its folder, or to another shard's file"
    if said.unscored > said.stop - said.start:
        return "it counts more rows without a score than it has"
    marker = _marker(path, said, common)
    if marker.retired:
        return marker
    try:
        found = marker.file.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{said.file} is not a file"
        if found.st_size != said.bytes:
            return f"{said.file} has {found.st_size} bytes, the marker says {said.bytes}"
        if deep and sha256_file(marker.file) != marker.sha256:
            return f"{said.file} has another sha256 than the marker says"
    except OSError as e:
        return f"{said.file}: {e.strerror}"
    attributes = {"digest": digest, "start": said.start, "stop": said.stop}
    return (deep and why_wrong(marker.file, attributes, schema, marker.rows)) or marker


def gaps(done: list[Marker], rows: int) -> list[tuple[int, int]]:
    """The row ranges that no done shard covers. Shards may overlap and may have been cut in any sizes."""
    open_from, found = 0, []
    for marker in sorted(done, key=lambda m: m.start):
        if marker.start > open_from:
            found.append((open_from, min(marker.start, rows)))
        open_from = max(open_from, marker.stop)
    if open_from < rows:
        found.append((open_from, rows))
    return [(a, b) for a, b in found if a < b]


def plan_shards(missing: list[tuple[int, int]], shard_rows: int) -> list[tuple[int, int]]:
    """Missing ranges cut at multiples of shard_rows."""
    shards = []
    for start, stop in missing:
        while start < stop:
            cut = min(stop, (start // shard_rows + 1) * shard_rows)
            shards.append((start, cut))
            start = cut
    return shards
