"""What `make fetch` brought: one folder an input, with its rows or its place, its size and its fingerprint.

    $SUITE_CACHE/inputs/datasets/<slug>/rows.jsonl, input.json
    $SUITE_CACHE/inputs/models/<slug>/input.json

Jobs, plans and status read these and nothing else, so they need neither a network nor the datasets library."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lib.errors import UserError
from lib.store.atomic import read_json, sha256_file, write_bytes, write_json

Record = TypeVar("Record", "DatasetInput", "ModelInput")


@dataclass(frozen=True)
class DatasetInput:
    id: str
    revision: str  # as asked for
    commit: str  # what it resolved to; "local" for a file
    split: str
    rows: int
    sha256: str  # of rows.jsonl
    bytes: int
    prompt_tokens: int  # of all rows, by the experiment's tokenizer, without the template; for the plan
    response_tokens: int
    source_stamp: str = ""  # sizes and mtimes of a local source, to notice that it changed


@dataclass(frozen=True)
class ModelInput:
    id: str
    revision: str
    commit: str
    path: str  # folder that from_pretrained reads
    fingerprint: str  # commit, or sha256 over the files of a local folder
    parameters: int
    body_parameters: int  # without embedding and output head: what every token is multiplied by
    head_parameters: int  # vocabulary x hidden, once
    bytes: int
    source_stamp: str = ""


def local_path(cache: Path, id: str) -> Path | None:
    """Where a local input lies: a path that starts with / . or ~ or ends in .jsonl, or cache:<path under the cache>.
    None for a Hub id."""
    if id.startswith("cache:"):
        return (cache / id.removeprefix("cache:")).resolve()
    if id.startswith(("/", ".", "~")) or id.endswith(".jsonl"):
        return Path(id).expanduser().resolve()
    return None


def slug(cache: Path, id: str, revision: str, split: str = "") -> str:
    """A folder name for an input: readable, and unique for local paths too."""
    where = local_path(cache, id)
    if where:
        return f"local--{where.stem}--{hashlib.sha256(str(where).encode()).hexdigest()[:10]}"
    return "--".join([*id.split("/"), revision[:12], *([split] if split else [])])


def dataset_folder(cache: Path, id: str, revision: str, split: str) -> Path:
    return cache / "inputs" / "datasets" / slug(cache, id, revision, split)


def model_folder(cache: Path, id: str, revision: str) -> Path:
    return cache / "inputs" / "models" / slug(cache, id, revision)


def dataset_input(cache: Path, id: str, revision: str, split: str) -> DatasetInput:
    found = _load(
        DatasetInput,
        dataset_folder(cache, id, revision, split),
        f"dataset {id}",
        revision,
        local_path(cache, id) is not None,
    )
    _unchanged(found, local_path(cache, id))
    return found


def model_input(cache: Path, id: str, revision: str) -> ModelInput:
    found = _load(
        ModelInput, model_folder(cache, id, revision), f"model {id}", revision, local_path(cache, id) is not None
    )
    _unchanged(found, local_path(cache, id))
    return found


def save_dataset(cache: Path, record: DatasetInput, lines: bytes) -> None:
    """rows.jsonl first, its record last: the record is what makes it there."""
    folder = dataset_folder(cache, record.id, record.revision, record.split)
    write_bytes(folder / "rows.jsonl", lines)
    write_json(folder / "input.json", asdict(record))


def save_model(cache: Path, record: ModelInput) -> None:
    write_json(model_folder(cache, record.id, record.revision) / "input.json", asdict(record))


def read_rows(cache: Path, spec: DatasetInput, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows, after a check that the file is the one that was recorded."""
    path = dataset_folder(cache, spec.id, spec.revision, spec.split) / "rows.jsonl"
    try:
        if sha256_file(path) != spec.sha256:
            raise UserError(f"{path} is not the file that was fetched (its sha256 differs); run `make fetch` again")
        with path.open(encoding="utf-8") as f:
            return [json.loads(line) for line, _ in zip(f, range(limit or spec.rows), strict=False)]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); run `make fetch`") from None


def source_stamp(path: Path) -> str:
    """Size and mtime of a local file, or of the files in a folder; nothing for what is not there."""
    if not path.exists():
        return ""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def _load(kind: type[Record], folder: Path, what: str, revision: str, local: bool) -> Record:
    raw = read_json(folder / "input.json")
    names = {f.name for f in fields(kind)}
    if raw is None or set(raw) != names:
        at = "" if local else f" at revision {revision}"
        raise UserError(f"{what}{at} is not fetched; run `make fetch` with this CONFIG on a machine that has it")
    return kind(**raw)


def _unchanged(record: DatasetInput | ModelInput, source: Path | None) -> None:
    now = source_stamp(source) if source else ""
    if now and now != record.source_stamp:
        raise UserError(f"{source} has changed since it was fetched; run `make fetch` again with this CONFIG")
