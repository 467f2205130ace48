"""Prepared sets of token sequences, as `make fetch` left them: one HDF5 file a set, and a record that vouches for it.

    $SUITE_CACHE/inputs/samples/<set>-<first 12 of its digest>/samples.h5, input.json

The file's bytes depend on its rows alone. A file that is cut off or changed is an error of one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np

from lib.base.atomic import read_file, write_bytes, write_json
from lib.base.errors import UserError, one_line
from lib.base.typed import Mistyped
from lib.inputs.records import RECORD, local_path, read_record, same_file, unchanged
from lib.store.columns import Column, check_columns, read_texts, to_hdf5
from lib.store.contents import Wrong, datasets

Values: TypeAlias = "list[str] | np.ndarray"
ALWAYS = ("ids", "lengths", "held_out")


@dataclass
class Rows:
    """Rows on their way into a file. `columns`: further values, one a row."""

    ids: list[list[int]] = field(default_factory=list)
    source: list[str] = field(default_factory=list)  # where in the dataset a row came from
    text_sha256: list[str] = field(default_factory=list)  # of the whole source text
    held_out: list[bool] = field(default_factory=list)
    columns: dict[str, Values] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)  # whatever was counted


@dataclass(frozen=True)
class SamplesInput:
    name: str
    digest: str
    source: str  # dataset id
    commit: str  # "local" for a folder
    rows: int  # in the file
    attributed: int  # rows that are not held out
    tokens: int  # of the attributed rows
    longest: int  # tokens of the longest attributed row
    sha256: str  # of samples.h5
    bytes: int
    source_stamp: str = ""  # of a local source, to notice that it changed
    facts: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (1 <= self.attributed <= self.rows and 1 <= self.longest <= self.tokens):
            raise Mistyped("there is nothing to attribute")


@dataclass(frozen=True)
class Samples:
    """A set that was read and verified. `columns` and `held` have a value for every row of the file."""

    every: list[np.ndarray]  # int32, all rows
    held: np.ndarray  # bool
    columns: dict[str, Values]
    attributes: dict[str, object]

    @cached_property
    def ids(self) -> list[np.ndarray]:
        """The rows to attribute, in order."""
        return [row for row, held in zip(self.every, self.held, strict=True) if not held]

    @cached_property
    def held_out(self) -> list[np.ndarray]:
        return [row for row, held in zip(self.every, self.held, strict=True) if held]

    @property
    def source(self) -> list[str]:
        """Where the rows of `ids` came from."""
        return [name for name, held in zip(self.columns["source"], self.held, strict=True) if not held]


def samples_folder(cache: Path, name: str, digest: str) -> Path:
    return cache / "inputs" / "samples" / f"{name}-{digest[:12]}"


def samples_input(cache: Path, name: str, digest: str, source: str) -> SamplesInput:
    """The record of a set of that source; a UserError when it is not prepared, or its source has changed since."""
    wanted = {"name": name, "digest": digest, "source": source}
    found = read_record(SamplesInput, samples_folder(cache, name, digest) / RECORD, wanted)
    if found is None:
        raise UserError(f"samples {name} are not prepared; run `make fetch` with this CONFIG")
    unchanged(local_path(cache, source), tree_stamp, found.source_stamp, f"samples {name} were made")
    return found


def save_samples(
    cache: Path,
    name: str,
    digest: str,
    rows: Rows,
    *,
    source: str,
    commit: str,
    source_stamp: str = "",
    attributes: dict[str, object],
) -> SamplesInput:
    """samples.h5 first, its record last: the record is what makes it there."""
    lengths = np.array([len(ids) for ids in rows.ids], dtype=np.int32)
    kept = lengths[~np.array(rows.held_out, dtype=bool)]
    if not kept.any():
        raise UserError(f"samples {name}: {source} gives not one token; check the split and the config")
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in rows.ids])
    columns: dict[str, Values] = {"ids": flat, "lengths": lengths, "held_out": np.array(rows.held_out, dtype=np.uint8)}
    columns |= {"source": rows.source, "text_sha256": rows.text_sha256, **rows.columns}
    schema = {key: Column("text" if isinstance(v, list) else v.dtype.str) for key, v in columns.items()}
    schema["ids"] = Column("int32", per="lengths")
    check_columns(schema, columns, len(lengths))
    data = to_hdf5(schema, columns, {key: json.dumps(value, sort_keys=True) for key, value in attributes.items()})
    found = SamplesInput(
        name=name,
        digest=digest,
        source=source,
        commit=commit,
        rows=len(lengths),
        attributed=len(kept),
        tokens=int(kept.sum()),
        longest=int(kept.max(initial=0)),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        source_stamp=source_stamp,
        facts=rows.facts,
    )
    folder = samples_folder(cache, name, digest)
    write_bytes(folder / "samples.h5", data)
    write_json(folder / RECORD, asdict(found))
    return found


def check_samples(cache: Path, record: SamplesInput) -> Path:
    """Where the file lies; a UserError when it is not the one that was recorded."""
    return same_file(samples_folder(cache, record.name, record.digest) / "samples.h5", record.sha256)


def read_samples(cache: Path, record: SamplesInput) -> Samples:
    path = check_samples(cache, record)
    try:
        with h5py.File(io.BytesIO(read_file(path)), "r") as f:
            columns = _columns(f)
            attributes = {key: json.loads(value) for key, value in f.attrs.items()}
        lengths, held = np.asarray(columns["lengths"]), np.asarray(columns["held_out"]).astype(bool)
        ends = np.cumsum(lengths)
        odd = [key for key, values in columns.items() if key != "ids" and len(values) != record.rows]
        if (
            odd
            or lengths.min(initial=0) < 0
            or len(columns["ids"]) != lengths.sum()
            or (~held).sum() != record.attributed
        ):
            raise Wrong(f"its columns do not fit its {record.rows} rows")
    except (Wrong, KeyError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as e:
        raise UserError(f"{path} is no set of samples ({one_line(e)}); delete it, then `make fetch` again") from None
    return Samples(
        every=np.split(columns["ids"], ends[:-1]),
        held=held,
        columns={key: values for key, values in columns.items() if key not in ALWAYS},
        attributes=attributes,
    )


def tree_stamp(path: Path) -> str:
    """Of the names, sizes and mtimes of a file, or of all files below a folder; nothing for what is not there.
    Hidden ones do not count: a clone's .git, a download's .cache."""
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder, below, names in os.walk(path):
            below[:] = [name for name in below if not name.startswith(".")]
            files += [Path(folder, name) for name in names if not name.startswith(".")]
    if not files:
        return ""
    files.sort()
    with ThreadPoolExecutor(16) as pool:  # a network file system answers each stat in a millisecond
        found = list(pool.map(_stat, files))
    parts = [[str(p.relative_to(path.parent)), *stat] for p, stat in zip(files, found, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stat(path: Path) -> tuple[int, int]:
    """Size and mtime; of a link whose target is gone, neither."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _columns(f: h5py.File) -> dict[str, Values]:
    """All that a file holds; columns differ from set to set."""
    found = dict(datasets(f))
    texts = {key.removesuffix("/ends") for key in found if key.endswith("/ends")}
    plain = {key: dataset[:] for key, dataset in found.items() if key.rpartition("/")[0] not in texts}
    return plain | {name: read_texts(f[name]) for name in texts}
