"""What a safetensors file holds, by its header alone: no weight is read."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # by safetensors' names: BF16, F32
    offset: int  # in the file
    bytes: int


def stored_tensors(path: Path) -> dict[str, Stored] | None:
    """Name -> tensor; None when the file's length is not the one that its header states, or it is something else."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > size:
                return None
            header = {k: v for k, v in json.loads(f.read(length)).items() if k != "__metadata__"}
        found, end = {}, 0
        for name, t in header.items():
            first, last = (int(place) for place in t["data_offsets"])
            found[name] = Stored(tuple(int(side) for side in t["shape"]), t["dtype"], 8 + length + first, last - first)
            end = max(end, last)
        return found if 8 + length + end == size else None
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        return None
