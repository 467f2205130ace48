"""transformers' own model with its layers over several devices, each layer's inputs brought to it."""

from collections import deque
from typing import Any

import torch
from torch import nn

from lib.checkpoint.families import family_of
from lib.models.weights import spread


def layer_map(config: Any, devices: list[torch.device]) -> dict[str, torch.device]:
    """For from_pretrained: which part of a model goes where."""
    what = "is not spread over several GPUs, so ask for one (run.gpus: 1); these are"
    names = family_of(config.model_type, what, lambda family: family.spreads).names
    found = {names.embedding: devices[0], names.rotary: devices[0]}
    layers = enumerate(spread(config.num_hidden_layers, devices))
    found |= {f"{names.stack}.{i}": device for i, device in layers}
    return found | {names.norm: devices[-1], names.head: devices[-1]}


def join(model: Any) -> None:
    """In place of the hooks that from_pretrained leaves on every module: one on each layer that is elsewhere than the
    first. Copies do not wait for the host, so several batches are under way at once."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    first = model.get_input_embeddings().weight.device
    brings: dict[torch.device, _Bring] = {}
    for layer in model.base_model.layers:
        here = next(layer.parameters()).device
        if here != first:
            layer.register_forward_pre_hook(brings.setdefault(here, _Bring(here)), with_kwargs=True)


class _Bring:
    """To one device. What several layers get (rope's table) is copied for the first of them: each copy makes the two
    devices wait for each other, and one a layer would make them work in turns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: deque[tuple[torch.Tensor, int, torch.Tensor]] = deque(maxlen=8)

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._moved(args), {name: self._moved(value) for name, value in kwargs.items()}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._moved, value))
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        if value.is_inference():  # has no version: it may have been written to since
            return value.to(self.device, non_blocking=True)
        for original, version, copy in self.copies:
            if original is value and version == value._version:
                return copy
        copy = value.to(self.device, non_blocking=True)
        self.copies.append((value, value._version, copy))
        return copy
