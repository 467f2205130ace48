"""The weights of the scored layers, read from the model's files: without the model, and without what draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.attribution.experiment import Part
from lib.checkpoint.headers import folder_tensors
from lib.checkpoint.layers import linear_weights
from lib.inputs.records import ModelInput
from lib.inputs.verified import check_here


def weights_of(model: ModelInput, parts: list[Part]) -> Iterator[Any]:
    """One at a time."""
    from safetensors import safe_open

    check_here(model)
    tensors = folder_tensors(Path(model.path))
    names = linear_weights(tensors)
    for part in parts:
        with safe_open(tensors[names[part.name]].path, "pt") as f:
            yield f.get_tensor(names[part.name])
