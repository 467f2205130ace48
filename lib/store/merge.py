"""Shards of a cell into one file: exact, whatever their sizes, overlaps or authors."""

import hashlib
from pathlib import Path

import h5py
import numpy as np

from lib.errors import UserError
from lib.store.atomic import read_json, sha256_file, write_bytes, write_json
from lib.store.shards import Cell, Marker, Schema, gaps, read_columns, scan, to_hdf5


def merge(cell: Cell, schema: Schema, config: str) -> Path:
    """Write <cell>/merged.h5 from verified shards; a missing or broken one is an error that names it."""
    done, bad = scan(cell.path, cell.digest, deep=True)
    missing = gaps(done, cell.rows)
    if missing:
        why = f"; {bad[0][0].name}: {bad[0][1]}" if bad else ""
        first = ", ".join(f"{a}-{b}" for a, b in missing[:3])
        raise UserError(
            f"cell {cell.index} ({cell.name}): rows {first} of {cell.rows} are not done{why}; run `make resume` first"
        )
    parts = [_rows_of(marker, schema, start, stop) for marker, start, stop in _cover(done, cell.rows)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in schema}
    data = to_hdf5(schema, columns, {"digest": cell.digest, "cell": cell.name, "rows": cell.rows, "config": config})
    path = cell.path / "merged.h5"
    write_bytes(path, data)
    write_json(
        cell.path / "merged.json",
        {"digest": cell.digest, "rows": cell.rows, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
    )
    return path


def _cover(done: list[Marker], rows: int) -> list[tuple[Marker, int, int]]:
    """Which rows to take from which shard: in order, each row once."""
    taken, at = [], 0
    for marker in sorted(done, key=lambda m: (m.start, -m.stop)):
        if marker.stop > at and at < rows:
            taken.append((marker, at, min(marker.stop, rows)))
            at = marker.stop
    return taken


def _rows_of(marker: Marker, schema: Schema, start: int, stop: int) -> dict[str, np.ndarray]:
    """The rows [start, stop) of one shard."""
    try:
        with h5py.File(marker.file, "r", locking=False) as f:
            columns = read_columns(f, schema)
    except (OSError, KeyError) as e:
        raise UserError(
            f"{marker.file} cannot be read ({e}); delete {marker.path.name} beside it and run `make resume`"
        ) from None
    a, b = start - marker.start, stop - marker.start
    out = {}
    for name, column in schema.items():
        if column.per:
            edges = np.concatenate([[0], np.cumsum(columns[column.per])])
            out[name] = columns[name][edges[a] : edges[b]]
        else:
            out[name] = columns[name][a:b]
    return out


def merged_is_current(cell: Cell) -> bool:
    """Whether merged.h5 is there, for this digest, with the sha256 that was recorded."""
    record = read_json(cell.path / "merged.json")
    path = cell.path / "merged.h5"
    return bool(
        record and record.get("digest") == cell.digest and path.exists() and sha256_file(path) == record["sha256"]
    )
