"""Shards of a cell: a range of rows in one HDF5 file named by its content, and a marker that vouches for it.

    <cell>/00000000-00001024-1f3a5c7e9b.h5     the data; the last part of the name is from its sha256
    <cell>/00000000-00001024.json              the marker: digest, sha256, size, and how it came about

"Done" means: the marker is there, it carries the cell's digest, and its file has the size and sha256 that it says, and,
wherever bytes are read, holds the rows that the marker vouches for.
The data file depends on the rows alone, not on who wrote it or when: two copies of a task that run at once write the
same file, and should they differ (two kinds of GPU), the marker still points at one whole file."""

import hashlib
import json
import re
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.base.atomic import remove, sha256_file, write_bytes, write_json
from lib.base.errors import UserError
from lib.base.process import HOST
from lib.base.typed import parse
from lib.store.columns import Schema, Values, check_columns, read_columns, to_hdf5
from lib.store.contents import why_wrong
from lib.store.raw import Written, write_with_raw

MARKER_NAME = re.compile(r"(\d{8})-(\d{8})\.json")
MOST_ROWS = 10**8  # that a marker's name has room for
FILE_NAME = re.compile(r"(\d{8}-\d{8})-[0-9a-f]+\.h5")


@dataclass(frozen=True)
class Cell:
    """One array index: a name, its rows and the digest of all that decides its results."""

    index: int
    name: str
    rows: int
    digest: str
    path: Path  # folder of its shards on scratch


@dataclass(frozen=True)
class Vouched:
    """What a marker says, as far as anything relies on it."""

    digest: str
    start: int
    stop: int
    file: str
    sha256: str
    bytes: int
    seconds: float
    unscored: int = 0
    attempt: str = ""
    gpus: int = 0
    device: str = ""
    tokens_computed: int = 0
    tokens_needed: int = 0
    tokens_pair_by_pair: int = 0


@dataclass(frozen=True)
class Marker:
    start: int
    stop: int
    path: Path  # of the marker itself
    file: Path
    sha256: str
    seconds: float  # the kernel's time, for rows/s
    info: dict[str, Any]  # all that stands in the marker; the fields of Vouched have their types

    @property
    def rows(self) -> int:
        return self.stop - self.start


def commit(
    folder: Path,
    digest: str,
    start: int,
    stop: int,
    schema: Schema,
    columns: Mapping[str, Values],
    info: dict[str, Any],
) -> Marker:
    """Write one shard and then its marker. Only raw columns may be given as functions (see write_with_raw)."""
    check_columns(schema, columns, stop - start)
    name = f"{start:08d}-{stop:08d}"
    file = _write(folder, name, schema, columns, {"digest": digest, "start": start, "stop": stop})
    with h5py.File(file.path, "r", locking=False) as f:  # can it be read back as what it is?
        read_columns(f, schema)
    if "status" in columns:  # in every schema that has one, 0 = the row has a result
        info = {**info, "unscored": int(np.count_nonzero(columns["status"]))}
    marker = {
        "digest": digest,
        "start": start,
        "stop": stop,
        "file": file.path.name,
        "sha256": file.sha256,
        "bytes": file.bytes,
        **info,
    }
    write_json(folder / f"{name}.json", marker)
    seconds = float(info.get("seconds", 0.0))
    return Marker(start, stop, folder / f"{name}.json", file.path, file.sha256, seconds, marker)


def _write(folder: Path, name: str, schema: Schema, columns: Mapping[str, Values], about: dict[str, Any]) -> Written:
    """A file whose name ends in the first letters of its sha256."""

    def named(sha: str) -> str:
        return f"{name}-{sha[:10]}.h5"

    if any(column.raw for column in schema.values()):
        return write_with_raw(folder, named, schema, columns, about, about["stop"] - about["start"])
    data = to_hdf5(schema, columns, about)
    sha = hashlib.sha256(data).hexdigest()
    write_bytes(folder / named(sha), data)
    return Written(folder / named(sha), sha, len(data))


def scan(
    folder: Path, digest: str, deep: bool = False, schema: Schema | None = None, rows: int = MOST_ROWS
) -> tuple[list[Marker], list[tuple[Path, str]]]:
    """The done shards of a cell of so many rows, and the markers that do not hold with the reason. `deep` reads every
    byte and looks at what the file holds: with its schema at every column, else at links and what it says of itself."""
    try:
        paths = sorted(p for p in folder.iterdir() if MARKER_NAME.fullmatch(p.name))
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise UserError(f"cannot list {folder}: {e.strerror}; check that scratch is mounted and readable") from None
    check = partial(_check, digest=digest, deep=deep, schema=schema, rows=rows)
    if deep or len(paths) > 64:  # a network file system answers each stat in a millisecond: ask for many at once
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(check, paths))
    else:
        results = list(map(check, paths))
    done = [r for r in results if isinstance(r, Marker)]
    bad = [(p, r) for p, r in zip(paths, results, strict=True) if isinstance(r, str)]
    return sorted(done, key=lambda m: (m.start, m.stop)), bad


def _check(path: Path, digest: str, deep: bool, schema: Schema | None, rows: int) -> Marker | str:
    """A marker that holds, or why it does not."""
    try:
        raw = json.loads(path.read_bytes())
        said = parse(Vouched, raw)
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
    marker = Marker(said.start, said.stop, path, path.parent / said.file, said.sha256, said.seconds, raw)
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
    about = {"digest": digest, "start": said.start, "stop": said.stop}
    return (deep and why_wrong(marker.file, about, schema, marker.rows)) or marker


def sweep(folder: Path) -> None:
    """Remove temporary files and folders whose writer is gone: a dead process of this host, or anything a day old."""
    for path in folder.glob(".tmp-*"):
        with suppress(OSError, ValueError):
            mine = path.name.startswith(f".tmp-{HOST}-")
            pid = int(path.name.removeprefix(f".tmp-{HOST}-").partition("-")[0]) if mine else 0
            if (mine and not Path(f"/proc/{pid}").exists()) or time.time() - path.stat().st_mtime > 86400:
                remove(path)


def set_aside(bad: list[tuple[Path, str]]) -> None:
    """Take markers that do not hold out of the way; nothing is deleted."""
    for path, _ in bad:
        with suppress(FileNotFoundError):  # another copy of the task was quicker
            path.rename(path.with_name(path.name + ".bad"))


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
