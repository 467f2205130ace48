"""What `make fetch` brought: one folder an input, with its rows or its place, its size and its fingerprint.

    $SUITE_CACHE/inputs/datasets/<slug>/rows.jsonl, input.json
    $SUITE_CACHE/inputs/models/<slug>/input.json
    $SUITE_CACHE/inputs/models/<slug>/converted-<commit>/   only where a model has no safetensors: made from its .bin

Jobs, plans and status read these and nothing else, so they need neither a network nor the datasets library."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from lib.base.atomic import read_json, sha256_file, write_bytes, write_json
from lib.base.errors import UserError, one_line
from lib.base.typed import Mistyped, parse
from lib.checkpoint.families import tables
from lib.checkpoint.headers import folder_tensors, stored_tensors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
RECORD = "input.json"

LEAST_ROW = len('{"messages": []}')  # bytes: more rows than that cannot be in a file
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # what from_pretrained reads
TORCH_SHARD = re.compile(r"pytorch_model-\d{5}-of-(\d{5})\.bin")


Messages = list[dict[str, str]]


class ChatRow(TypedDict):
    """A line of rows.jsonl."""

    messages: Messages


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

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise Mistyped("it has no rows")


@dataclass(frozen=True)
class ModelInput:
    id: str
    revision: str
    commit: str
    path: str  # folder that from_pretrained reads
    fingerprint: str  # commit, or sha256 over the files of a local folder; ends in -converted where its weights were
    parameters: int
    body_parameters: int  # without embedding and output head: what every token is multiplied by
    head_parameters: int  # vocabulary x hidden, once
    bytes: int  # of all model files
    source_stamp: str = ""
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256 of each model file


def local_path(cache: Path, id: str) -> Path | None:
    """Where a local input lies: a path that starts with / . or ~ or ends in .jsonl, or cache:<path under the cache>.
    None for a Hub id."""
    try:
        if id.startswith("cache:"):
            return (cache / id.removeprefix("cache:")).resolve()
        if id.startswith(("/", ".", "~")) or id.endswith(".jsonl"):
            return Path(id).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as e:  # links in a circle, a home that is nobody's, no path at all
        raise UserError(f"{id[:200]!r} is no path ({one_line(e)}); check the id in the config") from None
    return None


def slug(cache: Path, id: str, revision: str, split: str = "") -> str:
    """A folder name for an input: readable, and unique for local paths too."""
    where = local_path(cache, id)
    if where:
        return f"local--{where.stem}--{hashlib.sha256(str(where).encode()).hexdigest()[:10]}"
    short = revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision
    return "--".join([*id.split("/"), short, *([split] if split else [])]).replace("/", "-")


def dataset_folder(cache: Path, id: str, revision: str, split: str) -> Path:
    return cache / "inputs" / "datasets" / slug(cache, id, revision, split)


def model_folder(cache: Path, id: str, revision: str) -> Path:
    return cache / "inputs" / "models" / slug(cache, id, revision)


def dataset_input(cache: Path, id: str, revision: str, split: str) -> DatasetInput:
    source = local_path(cache, id)
    found = read_record(
        DatasetInput, dataset_folder(cache, id, revision, split) / RECORD, None if source else {"revision": revision}
    )
    if found is None or found.rows * LEAST_ROW > found.bytes:
        raise _not_fetched(f"dataset {id}", source, revision)
    unchanged(source, source_stamp, found.source_stamp, "it was fetched")
    return found


def model_input(cache: Path, id: str, revision: str) -> ModelInput:
    source = local_path(cache, id)
    found = read_record(
        ModelInput, model_folder(cache, id, revision) / RECORD, None if source else {"revision": revision}
    )
    if found is None:
        raise _not_fetched(f"model {id}", source, revision)
    unchanged(source, source_stamp, found.source_stamp, "it was fetched")
    return found


def read_record(kind: type[Record], path: Path, wanted: Mapping[str, str] | None = None) -> Record | None:
    """An input's record, where it is one, and of the input that is meant."""
    with suppress(Mistyped):
        found = parse(kind, read_json(path), exact=True)
        if all(getattr(found, key) == value for key, value in (wanted or {}).items()):
            return found
    return None


def unchanged(source: Path | None, stamp: Callable[[Path], str], recorded: str, since: str) -> None:
    """A UserError when a local source is there and another than it was."""
    now = stamp(source) if source else ""
    if now and now != recorded:
        raise UserError(f"{source} has changed since {since}; run `make fetch` again with this CONFIG")


def _not_fetched(what: str, source: Path | None, revision: str) -> UserError:
    at = "" if source else f" at revision {revision}"
    return UserError(f"{what}{at} is not fetched; run `make fetch` with this CONFIG on a machine that has it")


def save_dataset(cache: Path, record: DatasetInput, lines: bytes) -> None:
    """rows.jsonl first, its record last: the record is what makes it there."""
    folder = dataset_folder(cache, record.id, record.revision, record.split)
    write_bytes(folder / "rows.jsonl", lines)
    write_json(folder / RECORD, asdict(record))


def save_model(cache: Path, record: ModelInput) -> None:
    write_json(model_folder(cache, record.id, record.revision) / RECORD, asdict(record))


def read_rows(cache: Path, spec: DatasetInput, limit: int | None = None) -> list[ChatRow]:
    """The rows, after a check that the file is the one that was recorded."""
    path = check_rows(cache, spec)
    with path.open(encoding="utf-8") as f:
        return [json.loads(line) for line, _ in zip(f, range(limit or spec.rows), strict=False)]


def check_rows(cache: Path, spec: DatasetInput) -> Path:
    """Where the rows lie; a UserError when they are not what was recorded."""
    return same_file(dataset_folder(cache, spec.id, spec.revision, spec.split) / "rows.jsonl", spec.sha256)


def same_file(path: Path, sha256: str) -> Path:
    """The path, if its file is the one that was recorded."""
    try:
        if sha256_file(path) == sha256:
            return path
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); run `make fetch` again with this CONFIG") from None
    raise UserError(
        f"{path} is not the file that was fetched (its sha256 differs); run `make fetch` again with this CONFIG"
    )


def check_model(spec: ModelInput) -> None:
    """A UserError when the files of a model are not whole: sizes and safetensors headers, without reading weights."""
    folder = Path(spec.path)
    folder_tensors(folder)
    found = sum(path.stat().st_size for path in model_files(folder) if path.exists())
    if found != spec.bytes:
        raise UserError(f"model {spec.id}: {folder} holds {found} of {spec.bytes} bytes; run `make fetch` again")


@dataclass(frozen=True)
class ModelSizes:
    """What of a model's config.json is needed before it is loaded; 0 where it does not say."""

    vocab_size: int = 0
    hidden_size: int = 0
    max_position_embeddings: int = 0


def model_sizes(folder: Path) -> ModelSizes:
    raw = read_json(folder / "config.json")
    try:
        return parse(ModelSizes, None if raw is None else {k: v for k, v in raw.items() if v is not None})
    except Mistyped as e:
        raise UserError(
            f"{folder / 'config.json'} is not a model's ({e}); bring a whole one, then `make fetch` again"
        ) from None


def model_files(folder: Path) -> list[Path]:
    """Links whose file is gone are among them."""
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})


def broken_weights(folder: Path) -> list[Path]:
    """Safetensors files whose length is not the one that their own header states."""
    return sorted(path for path in folder.glob("*.safetensors") if stored_tensors(path) is None)


def torch_weights(names: Iterable[str]) -> list[str]:
    """Of a model's files those to convert: torch's own weights where there are no safetensors. One whole file goes
    before shards, as transformers has it."""
    names = set(names)
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        return []
    return sorted({"pytorch_model.bin"} & names or filter(TORCH_SHARD.fullmatch, names))


def parameters(folder: Path) -> tuple[int, int]:
    """(all parameters, those that every token is multiplied by) of a model's weights."""
    total, body, looked_up = 0, 0, tables(folder)
    for name, tensor in folder_tensors(folder).items():
        total += prod(tensor.shape)
        body += 0 if any(part in name for part in looked_up) else prod(tensor.shape)
    return total, body


def source_stamp(path: Path) -> str:
    """Size and mtime of a local file, or of the files in a folder; nothing for what is not there."""
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] if path.exists() else []
        return " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read ({e.strerror}); see to it that you may read it") from None
