"""Columns of a shard: what they hold, whether values fit them, and the HDF5 file that they make."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import numpy as np

CHUNK_ROWS = 16384  # 128 KiB of float64: one chunk for most shards, few for a merged cell
CHUNK_BYTES = 2 << 20  # of a column whose rows are arrays

Values = np.ndarray | Callable[[], np.ndarray]


@dataclass(frozen=True)
class Column:
    """One dataset of a shard: a value a row, or, with `per`, as many values a row as that integer column says.

    shape   every value is an array of this shape
    raw     arrays too large for memory, a row = a sum over a block of samples: stored whole, uncompressed and in one
            run, and added up over the rows when a cell is merged. dtype float32, or bfloat16: rounded from float32"""

    dtype: str
    per: str | None = None
    shape: tuple[int, ...] = ()
    raw: bool = False

    def __post_init__(self) -> None:
        if (self.dtype == "bfloat16" and not self.raw) or (self.raw and self.dtype not in ("float32", "bfloat16")):
            raise ValueError(f"{self}: bfloat16 is for raw columns, and these are float32 or bfloat16")
        if self.raw and (self.per or not self.shape):
            raise ValueError(f"{self}: a raw column has a shape and no `per`")

    @property
    def stored(self) -> np.dtype:
        """numpy's type of what is in the file; it has none for bfloat16, so its bits are kept."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def value_bytes(self) -> int:
        return self.stored.itemsize * prod(self.shape)


Schema = Mapping[str, Column]


def check_columns(schema: Schema, columns: Mapping[str, Values], rows: int) -> None:
    """Names, lengths and shapes; a raw column that is still to be computed is looked at when it comes."""
    if set(columns) != set(schema):
        raise ValueError(f"columns {sorted(columns)} are not the schema's {sorted(schema)}")
    for name, column in schema.items():
        values = columns[name]
        if column.raw:
            if not callable(values):
                check_raw(name, values, (rows, *column.shape))
            continue
        want = int(np.sum(columns[column.per])) if column.per else rows
        if len(values) != want:
            raise ValueError(f"column {name} has {len(values)} values, not {want}")
        if np.shape(values)[1:] != column.shape:
            raise ValueError(f"column {name} has values of shape {np.shape(values)[1:]}, not {column.shape}")


def check_raw(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    """The shape, but for a missing first axis of length 1."""
    if np.shape(values) != shape and (1, *np.shape(values)) != shape:
        raise ValueError(f"column {name} has shape {np.shape(values)}, not {shape}")


def to_hdf5(schema: Schema, columns: Mapping[str, np.ndarray], attributes: dict[str, Any]) -> bytes:
    """The bytes of an HDF5 file, the same for the same values.

    Made in memory, so that a full disk is a plain OSError of write() and never a broken HDF5 handle."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as f:
        fill(f, schema, columns, attributes)
    return buffer.getvalue()


def fill(f: h5py.File, schema: Schema, columns: Mapping[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Attributes and all columns that are not raw. Each chunk carries fletcher32.

    Shuffle + gzip 4 costs less time than it saves on a network file system. Not for arrays of scores, whose mantissas
    are noise: it saved 11 % at 30 MB/s (measured), as slow as scores are computed, so they are stored as they are."""
    for key, value in sorted(attributes.items()):
        f.attrs[key] = value
    for name, column in schema.items():
        if column.raw:
            continue
        values = np.ascontiguousarray(columns[name], dtype=column.dtype)
        packing = {} if column.shape else {"compression": "gzip", "compression_opts": 4, "shuffle": True}
        if len(values):
            f.create_dataset(name, data=values, chunks=chunk_of(column, len(values)), fletcher32=True, **packing)
        else:
            f.create_dataset(name, data=values)


def chunk_of(column: Column, rows: int) -> tuple[int, ...]:
    """Whole rows as far as they fit in CHUNK_BYTES, else parts of one."""
    chunk = [min(rows, CHUNK_ROWS), *column.shape]
    for axis in range(len(chunk) if column.shape else 0):
        rest = column.stored.itemsize * prod(chunk[axis + 1 :])
        chunk[axis] = min(chunk[axis], max(CHUNK_BYTES // rest, 1))
        if chunk[axis] > 1:
            break
    return tuple(chunk)


def read_columns(f: h5py.File, schema: Schema) -> dict[str, np.ndarray]:
    """All columns that are not raw."""
    return {name: f[name][:] for name, column in schema.items() if not column.raw}
