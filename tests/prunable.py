"""Models to prune: loaded both ways, their layers by short names, and all that they hold, bit by bit."""

import torch
from torch import nn

from lib.checkpoint.families import FAMILIES
from lib.models.load import load_decoder, load_model

CPU = [torch.device("cpu")]
LOADERS = ((load_model, ("sdpa", CPU)), (load_decoder, (64, 16)))


def module(model: nn.Module, name: str) -> nn.Linear:
    return model.get_submodule(FAMILIES[model.config.model_type].names.stack.removesuffix("layers") + name)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: raw(t) for name, t in model.state_dict().items()}


def decoder_bits(decoder) -> list[bytes]:
    tensors = [t for layer in decoder.weights.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    return [raw(t) for t in [decoder.weights.embedding, decoder.weights.norm, decoder.weights.head, *tensors]]
