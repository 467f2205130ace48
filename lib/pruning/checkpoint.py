"""A pruned model as a folder that loads anywhere: written from the folder that it came from, tensor by tensor.

    config.json, tokenizer files, licences    as they were (config.json: the MLP's new width, where neurons are removed)
    *.safetensors, its index                  neurons set to 0, or removed
    README.md, pruned_neurons.json            from what, which neurons, the files' sha256

In memory is one tensor that changes, as bytes of no type; what does not change is copied piece by piece."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lib.base.atomic import check_room, read_json, sha256_file, whole_folder
from lib.base.errors import UserError
from lib.checkpoint.families import Family, family_in
from lib.checkpoint.headers import INDEX, WHOLE, Stored, folder_tensors
from lib.checkpoint.layers import linear_weights
from lib.inputs.records import ModelInput, model_files
from lib.inputs.verified import check_here
from lib.pruning.together import Neurons, together

LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
ABOUT = "pruned_neurons.json"
PIECE = 16 << 20
Changes = Mapping[str, list[tuple[int, np.ndarray]]]  # tensor -> (dim, indices) of what goes


def save_pruned(
    model: ModelInput, neurons: Neurons, path: Path, *, remove: bool = False, about: Mapping[str, Any] | None = None
) -> None:
    """`path` whole or as it was."""
    if path.exists() and path.samefile(model.path):
        raise UserError(f"{path} is the model that is to be pruned; choose another folder")
    with whole_folder(path) as tmp:
        write_pruned(model, neurons, tmp, remove=remove, about=about)


def write_pruned(
    model: ModelInput, neurons: Neurons, folder: Path, *, remove: bool = False, about: Mapping[str, Any] | None = None
) -> None:
    """Fill an empty folder, as one that is committed as a cell's. `remove`: neurons are taken out, not set to 0; in
    config.json that can be said where every layer loses as many. `about`: more to be told, as how they were chosen."""
    check_here(model)
    source = Path(model.path)
    family, tensors = family_in(source, "cannot be pruned; these can"), folder_tensors(source)
    changes, lost = _changes(family, neurons, tensors, remove)
    check_room(folder / WHOLE, sum(t.bytes for t in tensors.values()))
    _copy_others(source, folder)
    if remove:
        config = read_json(source / "config.json") or {}
        config[family.inner] -= lost
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = {}
    for file in sorted({t.path for t in tensors.values()}):
        inside = {name: t for name, t in tensors.items() if t.path == file}
        files[file.name] = _write(folder / file.name, inside, changes, remove)
    if set(files) != {WHOLE}:
        size = sum(prod(_shape(t, changes.get(name, []), remove)) * _width(t) for name, t in tensors.items())
        places = {name: t.path.name for name, t in sorted(tensors.items())}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    chosen = {name: sorted({int(i) for i in indices}) for name, indices in neurons.items()}
    base = {"id": model.id, "commit": model.commit, "fingerprint": model.fingerprint}
    said = {"base": base, "removed": remove, "neurons": chosen, "sha256": files, "about": dict(about or {})}
    (folder / ABOUT).write_text(json.dumps(said, indent=1) + "\n")
    (folder / "README.md").write_text(_card(said))


def _changes(family: Family, neurons: Neurons, tensors: Mapping[str, Stored], remove: bool) -> tuple[Changes, int]:
    """What of each tensor goes, and how many neurons a layer loses where they are removed."""
    weights = linear_weights(tensors)
    outputs = {name: tensors[stored].shape[0] for name, stored in weights.items()}
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    groups = list(together(family, neurons, outputs))
    for parts, indices in groups:
        for name, dim in parts:
            found.setdefault(weights[name], []).append((dim, indices))
            bias = f"{weights[name].removesuffix('.weight')}.bias"
            if dim == 0 and bias in tensors:
                found.setdefault(bias, []).append((0, indices))
    return found, _lost(family, groups, outputs) if remove else 0


def _lost(family: Family, groups: list[tuple[list[tuple[str, int]], np.ndarray]], outputs: Mapping[str, int]) -> int:
    up, fix = family.linears.up, "write them as zeros instead (remove: false)"
    counts = {name: 0 for name in outputs if name.endswith(f".{up}")}
    for parts, indices in groups:
        if parts[0][0] not in counts:
            raise UserError(f"neurons of {parts[0][0]} cannot be removed: only an MLP's width can change; {fix}")
        counts[parts[0][0]] = len(indices)
    fewest, most = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    if counts[fewest] != counts[most]:
        raise UserError(
            f"{most} loses {counts[most]} neurons and {fewest} {counts[fewest]}: they cannot be removed, config.json "
            f"has one {family.inner} for all layers; choose as many of every layer (scope: layer), or {fix}"
        )
    if counts[most] >= min(outputs[name] for name in counts):
        raise UserError(f"no neuron of {most} would be left: they cannot be removed; {fix}")
    return counts[most]


def _copy_others(source: Path, folder: Path) -> None:
    licences = [path for pattern in LICENCES for path in source.glob(pattern)]
    for path in [*model_files(source), *licences]:
        if path.suffix != ".safetensors" and path.name not in (INDEX, ABOUT):
            shutil.copyfile(path, folder / path.name)


def _write(path: Path, tensors: Mapping[str, Stored], changes: Changes, remove: bool) -> str:
    """One file of weights, its tensors in their order; its sha256, once it was read back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, at = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)), 0
    for name, tensor in order:
        shape = _shape(tensor, changes.get(name, []), remove)
        size = prod(shape) * _width(tensor)
        header[name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("xb") as out:
        for data in [len(text).to_bytes(8, "little"), text]:
            out.write(data)
            sha.update(data)
        for name, tensor in order:
            for data in _data(tensor, changes.get(name, []), remove):
                out.write(data)
                sha.update(data)
    if sha256_file(path) != sha.hexdigest():
        raise OSError(errno.EIO, "what was read back differs from what was written", str(path))
    return sha.hexdigest()


def _data(tensor: Stored, changes: list[tuple[int, np.ndarray]], remove: bool) -> Iterator[bytes | memoryview]:
    with tensor.path.open("rb") as f:
        f.seek(tensor.offset)
        if not changes:
            for at in range(0, tensor.bytes, PIECE):
                yield f.read(min(PIECE, tensor.bytes - at))
            return
        values = np.fromfile(f, np.dtype((np.void, _width(tensor))), prod(tensor.shape)).reshape(tensor.shape)
    for dim, indices in changes:
        if remove:
            values = np.delete(values, indices, dim)
        else:
            values[(slice(None),) * dim + (indices,)] = np.zeros((), values.dtype)
    yield np.ascontiguousarray(values).view(np.uint8).data


def _shape(tensor: Stored, changes: list[tuple[int, np.ndarray]], remove: bool) -> tuple[int, ...]:
    shape = list(tensor.shape)
    for dim, indices in changes if remove else ():
        shape[dim] -= len(indices)
    return tuple(shape)


def _width(tensor: Stored) -> int:
    return tensor.bytes // max(prod(tensor.shape), 1)


def _card(said: Mapping[str, Any]) -> str:
    """The model card."""
    base, counts = said["base"], {name: len(indices) for name, indices in said["neurons"].items()}
    total, hub = sum(counts.values()), base["commit"] != "local"
    front = [
        "---",
        "library_name: transformers",
        "tags: [pruned]",
        *([f"base_model: {base['id']}"] if hub else []),
        "---",
    ]
    what = "removed" if said["removed"] else "set to 0 (their rows, biases and columns)"
    lines = [
        f"# {base['id'].rstrip('/').rpartition('/')[2]}, pruned",
        "",
        f"{base['id']} at commit `{base['commit']}` (fingerprint `{base['fingerprint']}`), {total:,} neurons {what}.",
        f"Which ones is in `{ABOUT}`; all other weights are the same bits.",
        "",
        *([f"- {key}: {value}" for key, value in said["about"].items()] + [""] if said["about"] else []),
        "| layer | neurons |",
        "| --- | ---: |",
        *(f"| {name} | {count:,} |" for name, count in counts.items()),
        "",
        "| file | sha256 |",
        "| --- | --- |",
        *(f"| {name} | `{sha}` |" for name, sha in said["sha256"].items()),
    ]
    return "\n".join([*front, "", *lines]) + "\n"
