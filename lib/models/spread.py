"""transformers' own model with its layers over several devices, each layer's inputs brought to it."""

from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.models.weights import spread


def layer_map(config: Any, devices: list[torch.device]) -> dict[str, torch.device]:
    """For from_pretrained: which part of a Llama or Qwen2 goes where."""
    if config.model_type not in ("llama", "qwen2"):
        raise UserError(f"a {config.model_type} is not spread over several GPUs; ask for one (run.gpus: 1)")
    layers = config.num_hidden_layers
    found = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    found |= {f"model.layers.{i}": device for i, device in enumerate(spread(layers, devices))}
    return found | {"model.norm": devices[-1], "lm_head": devices[-1]}


def join(model: Any) -> None:
    """In place of the hooks that from_pretrained leaves on every module: one on each layer that is elsewhere than the
    first. Copies do not wait for the host, so several batches are under way at once."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    first = model.get_input_embeddings().weight.device
    for layer in model.base_model.layers:
        here = next(layer.parameters()).device
        if here != first:
            layer.register_forward_pre_hook(_Bring(here), with_kwargs=True)


class _Bring:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._moved(args), {name: self._moved(value) for name, value in kwargs.items()}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device, non_blocking=True)
        return tuple(map(self._moved, value)) if isinstance(value, tuple) else value
