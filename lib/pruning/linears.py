"""The linear layers of a loaded model under one name each: transformers' own, or the decoder's merged weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lib.checkpoint.families import Family, last
from lib.models.decoder import Layer, Weights


@dataclass(frozen=True)
class Rows:
    """A run of a tensor's rows: all of a parameter, or a layer's share of a merged one."""

    whole: torch.Tensor
    first: int
    count: int

    @property
    def part(self) -> torch.Tensor:
        return self.whole[self.first : self.first + self.count]


@dataclass(frozen=True)
class Linear:
    weight: Rows
    bias: Rows | None


def linears(model: nn.Module | Weights, family: Family) -> dict[str, Linear]:
    """layers.3.mlp.up_proj -> where its weight and bias lie, for every linear layer of the decoder's layers."""
    found = _merged(model, family) if isinstance(model, Weights) else _modules(model, family)
    stack = last(family.names.stack)
    return {f"{stack}.{name}": linear for name, linear in found}


def _modules(model: nn.Module, family: Family) -> Iterator[tuple[str, Linear]]:
    for name, module in model.get_submodule(family.names.stack).named_modules():
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.detach(), module.bias
            yield (
                name,
                Linear(Rows(weight, 0, len(weight)), None if bias is None else Rows(bias.detach(), 0, len(bias))),
            )


def _merged(weights: Weights, family: Family) -> Iterator[tuple[str, Linear]]:
    for number, layer in enumerate(weights.layers):
        for name, linear in _of_layer(layer, family):
            yield f"{number}.{name}", linear


def _of_layer(layer: Layer, family: Family) -> Iterator[tuple[str, Linear]]:
    names, inner, q = family.linears, layer.down.shape[1], layer.o.shape[1]
    kv = (len(layer.qkv) - q) // 2
    for name, first, count in ((names.q, 0, q), (names.k, q, kv), (names.v, q + kv, kv)):
        bias = None if layer.qkv_bias is None else Rows(layer.qkv_bias, first, count)
        yield name, Linear(Rows(layer.qkv, first, count), bias)
    yield names.o, Linear(Rows(layer.o, 0, len(layer.o)), None)
    assert names.gate  # the decoder computes no other
    yield names.gate, Linear(Rows(layer.gate_up, 0, inner), None)
    yield names.up, Linear(Rows(layer.gate_up, inner, inner), None)
    yield names.down, Linear(Rows(layer.down, 0, len(layer.down)), None)
