"""What a model's safetensors files hold, by their headers alone: no weight is read."""

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from lib.base.errors import UserError, one_line

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # safetensors' own limit
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
BITS |= {"F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # by safetensors' names: BF16, F32
    offset: int  # in the file
    bytes: int


def folder_bytes(folder: Path) -> int:
    """Of all weights."""
    return sum(tensor.bytes for tensor in folder_tensors(folder).values())


def folder_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> tensor of a model's folder: the one place that says which files count, for every loader.

    As transformers chooses: model.safetensors where it is there, else the files that model.safetensors.index.json
    names, and nothing else (Mistral's and Llama's repositories hold consolidated.safetensors beside them, the same
    weights under other names). It would believe an index that contradicts its files; here that is an error."""
    named = _index(folder / INDEX)
    if named is None and not (folder / WHOLE).is_file():
        raise UserError(f"{folder} holds no weights ({WHOLE}, or {INDEX} and its files); run `make fetch` again")
    files = [WHOLE] if (folder / WHOLE).is_file() else sorted(set((named or {}).values()))
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in file_tensors(folder / file).items():
            if name in found:
                raise UserError(f"{folder}: {name} is in {found[name].path.name} and in {file}; remove one of the two")
            found[name] = tensor
    if named is not None:
        have = {name: tensor.path.name for name, tensor in found.items()}
        wrong = sorted(name for name in have.keys() | named.keys() if have.get(name) != named.get(name))
        if wrong:
            says, where = named.get(wrong[0], "in no file"), have.get(wrong[0], "in none")
            raise UserError(
                f"{folder / INDEX} does not fit its files: {wrong[0]} is {says} by the index and {where} by the "
                "headers; run `make fetch` again"
            )
    return found


def file_tensors(path: Path) -> dict[str, Stored]:
    """Name -> tensor of one file; a UserError where the header cannot be true of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError("its header is longer than it may be")
            text = f.read(length)
        if text[:1] != b"{":  # the format's own rule; json would pass over marks and blanks before it
            raise ValueError("its header does not begin with a brace")
        header = json.loads(text, object_pairs_hook=_once)
        about = header.pop("__metadata__", {})  # which the format's own reader wants as texts
        if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
            raise ValueError("its __metadata__ holds something else than texts")
        found = {name: _tensor(path, name, about, 8 + length) for name, about in header.items()}
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); run `make fetch` again") from None
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{path} is cut off or not a safetensors file ({one_line(e)}); run `make fetch` again"
        ) from None
    order = sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes))
    ends = [8 + length, *(tensor.offset + tensor.bytes for _, tensor in order)]
    for end, (name, tensor) in zip(ends, order, strict=False):
        if tensor.offset != end:
            raise UserError(
                f"{path}: {name} does not begin where the tensor before it ends: the file is damaged; "
                "run `make fetch` again"
            )
    if ends[-1] != size:
        raise UserError(
            f"{path} is cut off or not a safetensors file ({size} bytes, its header says {ends[-1]}); "
            "run `make fetch` again"
        )
    return found


def stored_tensors(path: Path) -> dict[str, Stored] | None:
    """The same, or None."""
    try:
        return file_tensors(path)
    except UserError:
        return None


def _tensor(path: Path, name: str, about: Any, start: int) -> Stored:
    """One entry of a header. What it says of place, shape and type has to be one and the same size."""
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by a type, a shape and a place")
    dtype, shape, place = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} is of the unknown type {dtype}")
    for numbers in (shape, place):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name} has the shape {shape} at {place}")
    if len(place) != 2 or (place[1] - place[0]) * 8 != prod(shape) * BITS[dtype]:
        raise ValueError(f"{name} is {shape} of {dtype} and lies at {place}, which is another size")
    return Stored(path, tuple(shape), dtype, start + place[0], place[1] - place[0])


def _index(path: Path) -> dict[str, str] | None:
    """Tensor -> file of an index; None where there is none."""
    if not path.is_file():
        return None
    try:
        named = json.loads(path.read_bytes(), object_pairs_hook=_once)["weight_map"]
        if not named or not all(isinstance(file, str) and Path(file).name == file for file in named.values()):
            raise ValueError("its weight_map names no files beside it")
        return dict(named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is no index of weights ({one_line(e)}); run `make fetch` again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice, and readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(a for (a, _), (b, _) in pairwise(sorted(pairs, key=lambda pair: pair[0])) if a == b)
        raise ValueError(f"{twice} stands in it twice")
    return found
