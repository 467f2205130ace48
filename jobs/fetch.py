"""Bring an experiment's models, tokenizers and datasets to the cache, at pinned revisions, and record them.

Run it where there is a network (a login node, a CPU job). Jobs then read only what is recorded here, offline. A branch
like `main` is resolved once: later calls keep that commit until UPDATE=1 is given."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.errors import UserError, exit_with
from lib.experiments import Experiment
from lib.experiments.base import DatasetSpec, ModelSpec
from lib.job import job
from lib.store.atomic import read_json, sha256_file
from lib.store.inputs import (
    DatasetInput,
    ModelInput,
    dataset_input,
    local_path,
    model_folder,
    model_input,
    save_dataset,
    save_model,
    source_stamp,
)

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
WEIGHTLESS = re.compile(r"embed_tokens|embed_positions|lm_head|wte|wpe")  # not a matmul of every token


def main() -> int:
    this = job("fetch", __doc__, indexed=False)
    fetch(this.experiment, this.site.cache, this.update)
    return 0


def fetch(experiment: Experiment, cache: Path, update: bool = False) -> None:
    tokenizer = None
    for spec in experiment.models():
        model = _kept(lambda s=spec: model_input(cache, s.id, s.revision), update) or _model(spec, cache)
        save_model(cache, model)
        size = f"{model.parameters / 1e9:.3g} B parameters, {model.bytes / 2**30:.3g} GiB"
        print(f"model {spec.id}: {model.commit[:12]}, {size}")
        tokenizer = _tokenizer(model.path)
    for data in experiment.datasets():
        found = _kept(lambda d=data: dataset_input(cache, d.id, d.revision, d.split), update)
        if found is None:
            found, lines = _dataset(data, cache, tokenizer)
            save_dataset(cache, found, lines)
        print(f"dataset {data.id}: {found.commit[:12]}, {found.rows} rows, sha256 {found.sha256[:12]}")


def _kept(read: Any, update: bool) -> Any:
    """An input that is recorded and still there; None when it has to be brought."""
    if update:
        return None
    try:
        found = read()
    except UserError:
        return None
    whole = not isinstance(found, ModelInput) or _weights(Path(found.path))[2] == found.bytes
    return found if whole else None


def _model(spec: ModelSpec, cache: Path) -> ModelInput:
    local = local_path(cache, spec.id)
    folder = local or _download(spec, cache)
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"model {spec.id}: {folder} holds no readable config.json")
    parameters, body, size = _weights(folder)
    if not parameters:
        raise UserError(f"model {spec.id}: no safetensors weights in {folder}")
    return ModelInput(
        id=spec.id,
        revision=spec.revision,
        commit="local" if local else folder.name,
        path=str(folder),
        fingerprint=_fingerprint(folder) if local else folder.name,
        parameters=parameters,
        body_parameters=body,
        head_parameters=int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0)),
        bytes=size,
        source_stamp=source_stamp(folder) if local else "",
    )


def _download(spec: ModelSpec, cache: Path) -> Path:
    """The snapshot folder <HF_HOME>/hub/models--.../snapshots/<commit>; a broken download goes on where it stopped."""
    from huggingface_hub import HfApi, snapshot_download

    pinned = read_json(model_folder(cache, spec.id, spec.revision) / "input.json") or {}
    try:
        info = HfApi().model_info(spec.id, revision=pinned.get("commit", spec.revision), files_metadata=True)
        files = [s for s in info.siblings or [] if any(Path(s.rfilename).match(p) for p in MODEL_FILES)]
        need = sum(s.size or 0 for s in files)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if need > free:
            raise UserError(
                f"model {spec.id} takes {need / 2**30:.0f} GiB and {cache} has {free / 2**30:.0f} GiB free; "
                "free some, or set SUITE_CACHE to a larger place"
            )
        return Path(snapshot_download(spec.id, revision=info.sha, allow_patterns=MODEL_FILES))
    except (OSError, ValueError, RuntimeError) as e:
        raise _unreachable(f"model {spec.id} at {spec.revision}", e) from None


def _dataset(spec: DatasetSpec, cache: Path, tokenizer: Any) -> tuple[DatasetInput, bytes]:
    local = local_path(cache, spec.id)
    rows, commit = _local_rows(local) if local else _hub_rows(spec)
    clean = [_messages(row, f"{spec.id}, row {i}") for i, row in enumerate(rows)]
    if not clean:
        raise UserError(f"dataset {spec.id} has no rows")
    lines = "".join(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in clean).encode()
    record = DatasetInput(
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
    return record, lines


def _local_rows(path: Path) -> tuple[list[Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"dataset {path} cannot be read: {e}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise UserError(f"dataset {path}, line {number}: not JSON ({e})") from None
    return rows, "local"


def _hub_rows(spec: DatasetSpec) -> tuple[Iterable[Any], str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(spec.id, revision=spec.revision).sha
        return load_dataset(spec.id, split=spec.split, revision=commit), str(commit)
    except (OSError, ValueError, RuntimeError) as e:
        raise _unreachable(f"dataset {spec.id} at {spec.revision}", e) from None


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    """{"messages": [...]}, or the published datasets' {"prompt", "completion"}, as messages."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        row = {"messages": [_turn("user", row["prompt"]), _turn("assistant", row["completion"])]}
    messages = row.get("messages") if isinstance(row, dict) else None
    good = isinstance(messages, list) and len(messages) >= 2 and all(_is_turn(m) for m in messages)
    if not good or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise UserError(
            f"dataset {where}: wanted messages that end with a user's and an assistant's, or prompt and completion; "
            f"got {json.dumps(row, default=str)[:120]}"
        )
    return [_turn(m["role"], m["content"]) for m in messages]


def _is_turn(m: Any) -> bool:
    return (
        isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str)
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _weights(folder: Path) -> tuple[int, int, int]:
    """(all parameters, those that every token is multiplied by, bytes), from the headers of the safetensors files."""
    total = body = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        found = path.stat().st_size
        try:
            with path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
            tensors = {k: v for k, v in header.items() if k != "__metadata__"}
            ends = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
        except (ValueError, OSError, MemoryError, OverflowError, KeyError, TypeError):
            raise UserError(f"{path} is not a safetensors file; delete it and run `make fetch` again") from None
        if ends != found:
            raise UserError(f"{path} has {found} bytes, its header says {ends}; delete it and run `make fetch` again")
        for name, tensor in tensors.items():
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
            body += 0 if WEIGHTLESS.search(name) else count
        size += found
    return total, body, size


def _fingerprint(folder: Path) -> str:
    """Of a local folder: the contents of what from_pretrained reads."""
    files = sorted({p for pattern in MODEL_FILES for p in folder.glob(pattern)})
    return hashlib.sha256(json.dumps([[p.name, sha256_file(p)] for p in files]).encode()).hexdigest()


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else None


def _count(tokenizer: Any, texts: Iterable[str]) -> int:
    """Tokens in all; four characters each where the model has no fast tokenizer."""
    texts = list(texts)
    if tokenizer is None:
        return sum(map(len, texts)) // 4
    return sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))


def _unreachable(what: str, e: Exception) -> UserError:
    code = getattr(getattr(e, "response", None), "status_code", None)
    if code in (401, 403):
        return UserError(
            f"{what}: access is refused; accept its licence on the Hub and log in with `.venv/bin/hf auth login`"
        )
    if code == 404:
        return UserError(f"{what}: there is no such thing on the Hub; check the id and the revision in the config")
    why = " ".join(str(e).split())[:160]
    return UserError(
        f"{what} cannot be fetched ({type(e).__name__}: {why}); run this on a node with a network, then again"
    )


if __name__ == "__main__":
    exit_with(main)
