"""Bring an experiment's models, tokenizers and datasets to the cache, at pinned revisions; make its sample sets.

Run it where there is a network (a login node, a CPU job). Jobs then read only what is recorded here, offline. A branch
like `main` is resolved once: later calls keep that commit until UPDATE=1 is given."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lib.base.atomic import read_file, read_json, whole_folder
from lib.base.errors import UserError, one_line, reading, shown
from lib.base.typed import is_text
from lib.inputs.hub import dataset_rows, forget, model_snapshot
from lib.inputs.kept import kept_or_made
from lib.inputs.prepare import prepare
from lib.inputs.prompts import Answerer
from lib.inputs.records import (
    TORCH_SHARD,
    DatasetInput,
    Messages,
    ModelInput,
    broken_weights,
    check_model,
    check_rows,
    dataset_folder,
    dataset_input,
    local_path,
    model_files,
    model_folder,
    model_input,
    model_sizes,
    parameters,
    save_dataset,
    save_model,
    source_stamp,
    torch_weights,
)
from lib.inputs.specs import DatasetSpec, ModelSpec, TokenSets
from lib.inputs.verified import altered, hashes, hashes_by_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")


class Needs(Protocol):
    """What an experiment says of its inputs."""

    def models(self) -> list[ModelSpec]: ...

    def datasets(self) -> list[DatasetSpec]: ...

    def token_sets(self) -> TokenSets | None: ...


def fetch(
    experiment: Needs, cache: Path, update: bool = False, by_hand: str = "", answerer: Answerer | None = None
) -> None:
    """`by_hand`: the command that makes, on a node with a GPU, what cannot be made here. `answerer`: who answers where
    prompts are chosen by a model's responses."""
    tokenizer, sets = None, experiment.token_sets()
    models = [*(sets.scorers() if sets else []), *experiment.models()]
    for spec in {(spec.id, spec.revision): spec for spec in models}.values():
        model = kept_or_made(
            model_folder(cache, spec.id, spec.revision),
            f"model {spec.id}",
            lambda spec=spec: None if update else _kept_model(spec, cache),
            lambda spec=spec: _model(spec, cache, update),
        )
        size = f"{model.parameters / 1e9:.3g} B parameters, {model.bytes / 2**30:.3g} GiB"
        print(f"model {spec.id}: {model.commit[:12]}, {size}", flush=True)
        tokenizer = _tokenizer(model.path)
    for data in experiment.datasets():
        found = kept_or_made(
            dataset_folder(cache, data.id, data.revision, data.split),
            f"dataset {data.id}",
            lambda data=data: None if update else _kept_dataset(data, cache),
            lambda data=data, tokenizer=tokenizer: _dataset(data, cache, tokenizer, update),
        )
        print(f"dataset {data.id}: {found.commit[:12]}, {found.rows} rows, sha256 {found.sha256[:12]}", flush=True)
    if sets:
        prepare(sets, experiment.models()[0], cache, update, by_hand, answerer)


def _kept_model(spec: ModelSpec, cache: Path) -> ModelInput | None:
    """A model that is recorded and whole to the last byte; None when it has to be brought."""
    with suppress(UserError):
        found = model_input(cache, spec.id, spec.revision)
        check_model(found)
        return None if altered(found) else found
    return None


def _forget_altered(spec: ModelSpec, cache: Path) -> None:
    """What of a recorded model is broken goes out of the way."""
    try:
        found = model_input(cache, spec.id, spec.revision)
        check_model(found)
    except UserError:
        return
    for path in altered(found):
        if found.source_stamp and path.parent == local_path(cache, spec.id):
            raise UserError(
                f"{path} has other bytes than before, with the same size and time: a disk's error; "
                "bring a whole one (or touch it, if it is meant), then `make fetch` again"
            )
        print(f"{path} is not the file that was fetched (its sha256 differs): bringing it anew", flush=True)
        forget(path)


def _kept_dataset(spec: DatasetSpec, cache: Path) -> DatasetInput | None:
    with suppress(UserError):
        found = dataset_input(cache, spec.id, spec.revision, spec.split)
        check_rows(cache, found)
        return found
    return None


def _model(spec: ModelSpec, cache: Path, update: bool) -> ModelInput:
    local = local_path(cache, spec.id)
    record = model_folder(cache, spec.id, spec.revision)
    if not update:
        _forget_altered(spec, cache)
    folder = local or model_snapshot(spec.id, _revision(record, spec.revision, update))
    sizes = model_sizes(folder)
    files = [folder / name for name in torch_weights(p.name for p in folder.glob("*"))]
    fingerprint = _fingerprint([*model_files(folder), *files]) if local else folder.name
    if files:
        folder = record / f"converted-{fingerprint[:12]}"
        fingerprint += "-converted"
        kept = _kept_model(spec, cache)
        if kept is None or kept.path != str(folder):
            _convert(files, folder)
    broken = broken_weights(folder)
    if broken:
        fix = "bring a whole one" if local else "delete it"
        raise UserError(f"{broken[0]} is cut off or not a safetensors file; {fix}, then `make fetch` again")
    count, body = parameters(folder)
    if not count:
        raise UserError(f"model {spec.id}: no weights (*.safetensors, pytorch_model*.bin) in {folder}")
    found = ModelInput(
        id=spec.id,
        revision=spec.revision,
        commit="local" if local else fingerprint.removesuffix("-converted"),
        path=str(folder),
        fingerprint=fingerprint,
        parameters=count,
        body_parameters=body,
        head_parameters=sizes.vocab_size * sizes.hidden_size,
        bytes=sum(path.stat().st_size for path in model_files(folder)),
        source_stamp=source_stamp(local) if local else "",
        files=hashes_by_name(folder),
    )
    save_model(cache, found)
    return found


def _convert(files: list[Path], folder: Path) -> None:
    """A model's folder whose weights are safetensors, made from one with torch's own files; whole or not at all."""
    from lib.inputs.torch_files import read_tensors, write_safetensors  # torch: only to convert

    shards = TORCH_SHARD.fullmatch(files[0].name)
    if shards and len(files) != int(shards[1]):
        raise UserError(f"{files[0].parent} holds {len(files)} of {int(shards[1])} shards; bring all of them")
    print(f"converting {', '.join(path.name for path in files)} to safetensors", flush=True)
    tensors = read_tensors(files)
    with whole_folder(folder) as new:
        for path in model_files(files[0].parent):
            if path.name != "pytorch_model.bin.index.json":
                shutil.copyfile(path, new / path.name)
        write_safetensors(tensors, new)


def _revision(record: Path, asked: str, update: bool) -> str:
    """The commit that an earlier call found, unless it should look again."""
    before = None if update else read_json(record / "input.json")
    return str((before or {}).get("commit", asked))


def _dataset(spec: DatasetSpec, cache: Path, tokenizer: "Tokenizer | None", update: bool) -> DatasetInput:
    local = local_path(cache, spec.id)
    revision = _revision(dataset_folder(cache, spec.id, spec.revision, spec.split), spec.revision, update)
    rows, commit = _local_rows(local) if local else dataset_rows(spec.id, spec.split, revision)
    clean = [_messages(row, f"{spec.id}, row {i}") for i, row in enumerate(rows)]
    if not clean:
        raise UserError(f"dataset {spec.id} has no rows")
    lines = "".join(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in clean).encode()
    found = DatasetInput(
        id=spec.id,
        revision=spec.revision,
        commit=commit,
        split=spec.split,
        rows=len(clean),
        sha256=hashlib.sha256(lines).hexdigest(),
        bytes=len(lines),
        prompt_tokens=_count(tokenizer, (t["content"] for m in clean for t in m[:-1])),
        response_tokens=_count(tokenizer, (m[-1]["content"] for m in clean)),
        source_stamp=source_stamp(local) if local else "",
    )
    save_dataset(cache, found, lines)
    return found


def _local_rows(path: Path) -> tuple[list[object], str]:
    try:
        text = read_file(path).decode()
    except (OSError, ValueError) as e:
        raise UserError(f"dataset {path} cannot be read: {e}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as e:
                raise UserError(f"dataset {path}, line {number}: not JSON ({one_line(e)})") from None
    return rows, "local"


def _messages(row: object, where: str) -> Messages:
    """{"messages": [...]}, or the published datasets' {"prompt", "completion"}, as messages."""
    fields = row if isinstance(row, dict) else {}
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if is_text(prompt) and is_text(completion):
        return [_turn("user", prompt), _turn("assistant", completion)]
    messages = fields.get("messages")
    good = isinstance(messages, list) and len(messages) >= 2 and all(_is_turn(m) for m in messages)
    if not good or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise UserError(
            f"dataset {where}: wanted messages that end with a user's and an assistant's, or prompt and completion; "
            f"got {shown(row)}"
        )
    return [_turn(m["role"], m["content"]) for m in messages]


def _is_turn(m: object) -> bool:
    return isinstance(m, dict) and m.get("role") in ROLES and is_text(m.get("content"))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _fingerprint(files: list[Path]) -> str:
    """Of a local folder: the contents of what from_pretrained reads."""
    named = zip((path.name for path in files), hashes(files), strict=True)
    return hashlib.sha256(json.dumps([list(pair) for pair in named]).encode()).hexdigest()


def _tokenizer(folder: str) -> "Tokenizer | None":
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    with reading(f"{path} is no tokenizer", "bring a whole one, then `make fetch` again"):
        return Tokenizer.from_file(str(path)) if path.is_file() else None


def _count(tokenizer: "Tokenizer | None", texts: Iterable[str]) -> int:
    """Tokens in all; four characters each where the model has no fast tokenizer."""
    texts = list(texts)
    if tokenizer is None:
        return sum(map(len, texts)) // 4
    with reading("tokenizer.json cannot read the dataset's texts", "bring a whole one, then `make fetch` again"):
        return sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))
