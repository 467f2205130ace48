"""What an HDF5 file of ours must hold: its own attributes, and plain datasets of the schema's types and lengths.

A sha256 says that a file is the one that was recorded, not that the record told the truth about it. HDF5 can also point
elsewhere (links to other files, datasets that are views of others): nothing of that is followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lib.store.columns import TEXT, Schema, read_texts


class Wrong(Exception):
    """Why a file is not what it should be."""


def why_wrong(path: Path, about: Mapping[str, Any], schema: Schema | None, rows: int, summed: bool = False) -> str:
    """'' for a file with these attributes and columns of so many rows. `summed`: raw columns are sums over the rows."""
    try:
        with h5py.File(path, "r", locking=False) as f:
            for key, value in about.items():
                if key not in f.attrs or _plain(f.attrs[key]) != value:
                    raise Wrong(f"its {key} is {str(_plain(f.attrs.get(key)))[:20]}, not {str(value)[:20]}")
            found = dict(datasets(f))
            if schema is not None:
                _fit(found, schema, rows, summed)
    except Wrong as e:
        return f"{path.name}: {e}"
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as e:  # whatever HDF5 stumbles over
        return f"{path.name} cannot be read ({' '.join(str(e).split())[:120]})"
    return ""


def datasets(f: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """All of a file, each reached once and stored in the file itself."""
    groups: list[tuple[str, h5py.Group]] = [("", f)]
    seen = {_address(f)}
    while groups:
        at, group = groups.pop()
        for key in group:
            name = f"{at}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise Wrong(f"{name} points elsewhere")
            one = group[key]
            if (address := _address(one)) in seen:
                raise Wrong(f"{name} is a second name")
            seen.add(address)
            if isinstance(one, h5py.Group):
                groups.append((f"{name}/", one))
            elif not isinstance(one, h5py.Dataset) or one.is_virtual or one.external:
                raise Wrong(f"{name} is not stored in the file itself")
            else:
                yield name, one


def _address(one: h5py.HLObject) -> int:
    h5o: Any = import_module("h5py.h5o")  # compiled, and not among the names that h5py declares
    return h5o.get_info(one.id).addr


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _fit(found: Mapping[str, h5py.Dataset], schema: Schema, rows: int, summed: bool) -> None:
    wanted = {f"{name}/{part}" for name, c in schema.items() if c.text for part in TEXT}
    wanted |= {name for name, c in schema.items() if not c.text}
    if odd := sorted(set(found) ^ wanted):
        raise Wrong(f"its columns are not the experiment's ({', '.join(odd)[:80]})")
    counts_first = sorted(schema, key=lambda name: schema[name].per is not None)
    for name in counts_first:
        column = schema[name]
        lead = (_demanded(found[column.per], name) if column.per else rows,)
        if column.text:
            _fit_texts({part: found[f"{name}/{part}"] for part in TEXT}, name, lead)
            continue
        dataset, total = found[name], summed and column.raw
        rounded = column.dtype == "bfloat16" and not total
        if dataset.dtype != (column.stored if not total else np.float32) or _is_bfloat16(dataset) != rounded:
            raise Wrong(f"{name} holds {dataset.dtype}, not {column.dtype}")
        _shaped(dataset, name, (*(() if total else lead), *column.shape))


def _fit_texts(parts: Mapping[str, h5py.Dataset], name: str, lead: tuple[int]) -> None:
    for part, dtype in TEXT.items():
        if parts[part].dtype != dtype:
            raise Wrong(f"{name}/{part} holds {parts[part].dtype}, not {dtype}")
    _shaped(parts["ends"], f"{name}/ends", lead)
    _shaped(parts["bytes"], f"{name}/bytes", (int(parts["bytes"].size or 0),))
    try:
        read_texts(parts["ends"].parent)
    except ValueError as e:
        raise Wrong(f"{name} is no text: {e}") from None


def _shaped(dataset: h5py.Dataset, name: str, shape: tuple[int, ...]) -> None:
    if dataset.shape != shape:
        raise Wrong(f"{name} has shape {dataset.shape}, not {shape}")
    if dataset.size and dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        raise Wrong(f"{name} was never written")


def _is_bfloat16(dataset: h5py.Dataset) -> bool:
    return _plain(dataset.attrs.get("dtype")) == "bfloat16"


def _demanded(counts: h5py.Dataset, name: str) -> int:
    """Values of a column that has as many a row as another one says."""
    values = counts[:]
    if values.size and values.min() < 0:
        raise Wrong(f"{name} would have fewer values than none")
    return int(values.sum(dtype=np.int64))
