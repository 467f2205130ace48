"""Columns of a shard: what they hold, whether values fit them, and the HDF5 file that they make."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from string import ascii_lowercase
from typing import Any, TypeAlias

import h5py
import numpy as np

CHUNK_ROWS = 16384  # 128 KiB of float64: one chunk for most shards, few for a merged cell
CHUNK_BYTES = 2 << 20  # of a column whose rows are arrays

TEXT = {"bytes": "uint8", "ends": "int64"}  # how a text column lies in the file, a dataset each

Values: TypeAlias = "np.ndarray | list[str] | Callable[[], np.ndarray]"


@dataclass(frozen=True)
class Column:
    """One dataset of a shard: a value a row, or, with `per`, as many values a row as that integer column says.

    dtype   numpy's name of a type; or "text": str of any length, as UTF-8 in <name>/bytes, one after another, and
            where each ends in <name>/ends. HDF5's own texts lie outside of the chunks that carry a checksum
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
        if self.text and self.shape:
            raise ValueError(f"{self}: a text has no shape")

    @property
    def text(self) -> bool:
        return self.dtype == "text"

    @property
    def stored(self) -> np.dtype:
        """numpy's type of what is in the file; it has none for bfloat16, so its bits are kept. Of a text: its end's."""
        return np.dtype(TEXT["ends"] if self.text else "uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def value_bytes(self) -> int:
        """Without numpy: a plan asks this of all cells."""
        dtype = TEXT["ends"] if self.text else self.dtype
        return (1 if dtype == "bool" else int(dtype.lstrip(ascii_lowercase)) // 8) * prod(self.shape)


Schema = Mapping[str, Column]


def check_columns(schema: Schema, columns: Mapping[str, Values], rows: int) -> None:
    """Names, lengths and shapes; a raw column that is still to be computed is looked at when it comes."""
    if set(columns) != set(schema):
        raise ValueError(f"columns {sorted(columns)} are not the schema's {sorted(schema)}")
    for name, column in schema.items():
        values = columns[name]
        if column.raw:
            if not callable(values):
                check_raw(name, np.asarray(values), (rows, *column.shape))
            continue
        values = present(columns, name)
        want = int(np.sum(np.asarray(present(columns, column.per)))) if column.per else rows
        if len(values) != want:
            raise ValueError(f"column {name} has {len(values)} values, not {want}")
        if column.text:
            check_texts(name, list(values))
        elif np.shape(values)[1:] != column.shape:
            raise ValueError(f"column {name} has values of shape {np.shape(values)[1:]}, not {column.shape}")


def present(columns: Mapping[str, Values], name: str) -> np.ndarray | list[str]:
    """Values that are there already: only those of a raw column may be still to be computed."""
    values = columns[name]
    if callable(values):
        raise ValueError(f"column {name} is given as a function, and is not raw")
    return values


def check_raw(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    """The shape, but for a missing first axis of length 1."""
    if np.shape(values) != shape and (1, *np.shape(values)) != shape:
        raise ValueError(f"column {name} has shape {np.shape(values)}, not {shape}")


def check_texts(name: str, values: Sequence[object]) -> None:
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"column {name} holds text, and its value {i} is a {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"column {name}: its text {i} has no UTF-8 ({e.reason})") from None


def to_hdf5(schema: Schema, columns: Mapping[str, Any], attributes: dict[str, Any]) -> bytes:
    """The bytes of an HDF5 file, the same for the same values.

    Made in memory, so that a full disk is a plain OSError of write() and never a broken HDF5 handle."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as f:
        fill(f, schema, columns, attributes)
    return buffer.getvalue()


def fill(f: h5py.File, schema: Schema, columns: Mapping[str, Any], attributes: dict[str, Any]) -> None:
    """Attributes and all columns that are not raw. Each chunk carries fletcher32.

    Shuffle + gzip 4 costs less time than it saves on a network file system. Not for arrays of scores, whose mantissas
    are noise: it saved 11 % at 30 MB/s (measured), as slow as scores are computed, so they are stored as they are."""
    for key, value in sorted(attributes.items()):
        f.attrs[key] = value
    for name, column in schema.items():
        if column.raw:
            continue
        if column.text:
            texts = [text.encode() for text in columns[name]]
            ends = np.cumsum([len(text) for text in texts], dtype=TEXT["ends"])
            _put(f, f"{name}/bytes", np.frombuffer(b"".join(texts), TEXT["bytes"]), (CHUNK_BYTES,))
            _put(f, f"{name}/ends", ends, (CHUNK_ROWS,))
        else:
            values = np.ascontiguousarray(columns[name], dtype=column.dtype)
            _put(f, name, values, chunk_of(column, len(values)))


def _put(f: h5py.File, name: str, values: np.ndarray, chunk: tuple[int, ...]) -> None:
    packing = {} if values.ndim > 1 else {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    if len(values):
        chunk = (min(chunk[0], len(values)), *chunk[1:])
        f.create_dataset(name, data=values, chunks=chunk, fletcher32=True, **packing)
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


def read_columns(f: h5py.File, schema: Schema) -> dict[str, Any]:
    """All columns that are not raw: arrays, and lists of str."""
    return {name: read_texts(f[name]) if c.text else f[name][:] for name, c in schema.items() if not c.raw}


def read_texts(group: h5py.Group) -> list[str]:
    """A ValueError where ends do not fit the bytes, or these are no UTF-8."""
    data, ends = group["bytes"][:].tobytes(), group["ends"][:].tolist()
    edges = [0, *ends]
    if edges[-1] != len(data) or any(a > b for a, b in pairwise(edges)):
        raise ValueError(f"the ends of its texts do not fit their {len(data)} bytes")
    return [data[a:b].decode() for a, b in pairwise(edges)]
