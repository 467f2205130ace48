"""Shards of a cell into one file: exact, whatever their sizes, overlaps or authors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.base.atomic import read_json, sha256_file, write_bytes, write_json
from lib.base.errors import UserError
from lib.base.typed import Mistyped, parse
from lib.store.columns import Column, Schema, Values, check_columns, read_columns, to_hdf5
from lib.store.contents import why_wrong
from lib.store.markers import needed, set_aside
from lib.store.raw import read_array, write_with_raw
from lib.store.shards import MOST_ROWS, Cell, Marker, gaps, scan


@dataclass(frozen=True)
class Merged:
    """What merged.json says of merged.h5."""

    digest: str
    rows: int
    sha256: str
    bytes: int


def read_cell(cell: Cell, schema: Schema, names: Iterable[str]) -> dict[str, Any]:
    """Columns of a cell that is done, all of its rows, from verified shards."""
    wanted = {name: schema[name] for name in names}
    parts = [_rows_of(marker, wanted, start, stop) for marker, start, stop in _verified(cell, schema)]
    return {name: _joined(column, [part[name] for part in parts]) for name, column in wanted.items()}


def read_done(cell: Cell, schema: Schema) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row that is there, by itself, of a cell that need not be done."""
    done, bad = scan(cell.path, cell.digest, deep=True, schema=schema, rows=cell.rows or MOST_ROWS)
    set_aside(bad)
    for marker, start, stop in _cover(done, cell.rows or MOST_ROWS):
        for row in range(start, stop):
            yield row, _rows_of(marker, schema, row, row + 1)


def _verified(cell: Cell, schema: Schema) -> list[tuple[Marker, int, int]]:
    """Which rows to take from which shard; a missing or broken one is an error that names it."""
    done, bad = scan(cell.path, cell.digest, deep=True, schema=schema, rows=cell.total)
    missing = gaps(done, cell.total)
    if missing:
        set_aside(bad)  # else `make resume`, which reads no shard, would find nothing to do
        why = f"; {bad[0][0].name}: {bad[0][1]}" if bad else ""
        first = ", ".join(f"{a}-{b}" for a, b in missing[:3])
        raise UserError(
            f"cell {cell.index} ({cell.name}): rows {first} of {cell.total} are not done{why}; run `make resume` first"
        )
    return _cover(done, cell.total)


def merge(cell: Cell, schema: Schema, config: str) -> Path:
    """Write <cell>/merged.h5 from verified shards."""
    taken = _verified(cell, schema)
    parts = [_rows_of(marker, schema, start, stop) for marker, start, stop in taken]
    columns = {name: _joined(c, [p[name] for p in parts]) for name, c in schema.items() if not c.raw}
    check_columns({name: column for name, column in schema.items() if not column.raw}, columns, cell.total)
    about = {"digest": cell.digest, "cell": cell.name, "rows": cell.total, "config": config}
    path = cell.path / "merged.h5"
    if any(column.raw for column in schema.values()):
        sha, size = _merge_raw(path, schema, columns, about, taken)
    else:
        data = to_hdf5(schema, columns, about)
        write_bytes(path, data)
        sha, size = hashlib.sha256(data).hexdigest(), len(data)
    write_json(cell.path / "merged.json", asdict(Merged(cell.digest, cell.total, sha, size)))
    return path


def _merge_raw(
    path: Path,
    schema: Schema,
    columns: Mapping[str, Values],
    about: dict[str, Any],
    taken: list[tuple[Marker, int, int]],
) -> tuple[str, int]:
    """Each raw column is summed over the rows when it is its turn to be written."""
    rows = [(marker, row - marker.start) for marker, start, stop in taken for row in range(start, stop)]
    summed = {name: replace(c, dtype="float32") if c.raw else c for name, c in schema.items()}
    sums = {name: partial(_sum, name, rows) for name, c in schema.items() if c.raw}
    about = {**about, "blocks": len(rows)}
    done = write_with_raw(path.parent, lambda sha: path.name, summed, {**columns, **sums}, about, None)
    return done.sha256, done.bytes


def _sum(name: str, rows: list[tuple[Marker, int]]) -> np.ndarray:
    """In float32, in the order of the rows: the same bits however they lie in shards."""
    total: np.ndarray | None = None
    for marker, row in rows:
        with _reading(marker), h5py.File(marker.file, "r", locking=False) as f:
            part = read_array(f[name], row)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _cover(done: list[Marker], rows: int) -> list[tuple[Marker, int, int]]:
    """Which rows to take from which shard: in order, each row once."""
    taken, at = [], 0
    for marker in sorted(done, key=lambda m: (m.start, -m.stop)):
        if marker.stop > at and at < rows:
            taken.append((marker, max(at, marker.start), min(marker.stop, rows)))
            at = marker.stop
    return taken


def _joined(column: Column, parts: list[Any]) -> np.ndarray | list[str]:
    return [text for part in parts for text in part] if column.text else np.concatenate(parts)


def _rows_of(marker: Marker, schema: Schema, start: int, stop: int) -> dict[str, Any]:
    """The rows [start, stop) of one shard."""
    with _reading(marker), h5py.File(marker.file, "r", locking=False) as f:
        columns = read_columns(f, schema)
    a, b = start - marker.start, stop - marker.start
    out = {}
    for name in columns:
        column = schema[name]
        if column.per:
            edges = np.concatenate([[0], np.cumsum(columns[column.per])])
            out[name] = columns[name][edges[a] : edges[b]]
        else:
            out[name] = columns[name][a:b]
    return out


@contextmanager
def _reading(marker: Marker) -> Iterator[None]:
    needed(marker)
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as e:
        fix = f"delete {marker.path.name} beside it and run `make resume`"
        raise UserError(f"{marker.file} cannot be read ({e}); {fix}") from None


def rounding_of(cell: Cell, schema: Schema) -> tuple[float, float] | None:
    """(largest relative error of a value, largest share of an array's sum of |x|) that rounding to bfloat16 took from a
    block of a cell; None where nothing was rounded."""
    names = [name for name, column in schema.items() if column.dtype == "bfloat16"]
    found = []
    for marker in scan(cell.path, cell.digest)[0] if names else []:
        with _reading(marker), h5py.File(marker.file, "r", locking=False) as f:
            notes = [f[name].attrs for name in names]
            found += [(note["rounding_max_relative"], note["rounding_l1_relative"]) for note in notes]
    return (float(max(a for a, _ in found)), float(max(b for _, b in found))) if found else None


def merged_is_current(cell: Cell, schema: Schema) -> bool:
    """Whether merged.h5 is there, for this digest, with the sha256 that was recorded and the cell's rows in it."""
    path, about = cell.path / "merged.h5", {"digest": cell.digest, "cell": cell.name, "rows": cell.total}
    with suppress(OSError, Mistyped):
        said = parse(Merged, read_json(cell.path / "merged.json"), exact=True)
        if (said.digest, said.rows, said.bytes) == (cell.digest, cell.total, path.stat().st_size):
            return sha256_file(path) == said.sha256 and not why_wrong(path, about, schema, cell.total, summed=True)
    return False
