"""Output neurons of a loaded model's linear layers set to 0 and back, in place, in a few launches a layer.

    pruner = Pruner(model, family)                                  # transformers' model, or the decoder's Weights
    with pruner.applied({"layers.3.mlp.up_proj": [5, 17]}):
        ...                                                         # pruned here, afterwards bit for bit as before

An MLP's neuron is one whichever of its layers names it (up, gate, fc1): its rows of up and gate, their biases, and its
column of down are 0. Any of them alone gives the same function; all together can be taken out for good. Of any other
layer a neuron is its row and its bias. Where two models share their tensors, it is done to one of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lib.base.errors import UserError, shown
from lib.checkpoint.families import Family
from lib.models.decoder import Weights
from lib.pruning.linears import Linear, Rows, linear_named, linears

Neurons = Mapping[str, Sequence[int] | np.ndarray]  # layer -> indices of its outputs


@dataclass(frozen=True)
class Edit:
    """Rows (dim 0) or columns (dim 1) of one tensor."""

    tensor: torch.Tensor
    dim: int
    index: torch.Tensor  # int64, where the tensor is


@dataclass(frozen=True)
class Plan:
    """Neurons made ready: their indices are on the devices, so that applying them waits for nothing."""

    edits: list[Edit]
    neurons: int  # one that both up and gate name is one


class Pruner:
    def __init__(self, model: nn.Module | Weights, family: Family) -> None:
        self.family, self.linears = family, linears(model, family)
        self._undo: list[tuple[Edit, torch.Tensor]] | None = None

    def prepare(self, neurons: Neurons) -> Plan:
        """Check the indices and bring them to the devices; a plan can be applied again and again."""
        places: dict[tuple[int, int], list[np.ndarray]] = {}
        tensors: dict[int, torch.Tensor] = {}
        count = 0

        def note(rows: Rows | None, dim: int, indices: np.ndarray) -> None:
            if rows is not None:
                tensors[id(rows.whole)] = rows.whole
                places.setdefault((id(rows.whole), dim), []).append(indices + (rows.first if dim == 0 else 0))

        for parts, indices in self._together(neurons):
            count += len(indices)
            for linear, dim in parts:
                note(linear.weight, dim, indices)
                if dim == 0:
                    note(linear.bias, 0, indices)
        wanted = [(tensors[key], dim, np.unique(np.concatenate(some))) for (key, dim), some in places.items()]
        return Plan(_upload(wanted), count)

    @torch.no_grad()
    def apply(self, neurons: Neurons | Plan) -> None:
        if self._undo is not None:
            raise RuntimeError("neurons are applied already: undo them first")
        plan = neurons if isinstance(neurons, Plan) else self.prepare(neurons)
        # All is read before anything is written: a row and a column may cross, and memory may run out.
        saved = [(edit, edit.tensor.index_select(edit.dim, edit.index)) for edit in plan.edits]
        self._undo = saved
        for edit in plan.edits:
            edit.tensor.index_fill_(edit.dim, edit.index, 0)

    @torch.no_grad()
    def undo(self) -> None:
        if self._undo is None:
            raise RuntimeError("no neurons are applied: there is nothing to undo")
        for edit, values in self._undo:
            edit.tensor.index_copy_(edit.dim, edit.index, values)
        self._undo = None

    @contextmanager
    def applied(self, neurons: Neurons | Plan) -> Iterator[None]:
        self.apply(neurons)
        try:
            yield
        finally:
            self.undo()

    def _together(self, neurons: Neurons) -> Iterator[tuple[list[tuple[Linear, int]], np.ndarray]]:
        """What is set to 0 together, each with the dimension that the indices are of."""
        names = self.family.linears
        mlps: dict[str, list[np.ndarray]] = {}
        for name, given in neurons.items():
            linear = linear_named(self.linears, name)
            indices = _checked(name, given, linear.weight.count)
            layer = next(
                (name.removesuffix(up) for up in (names.up, names.gate) if up and name.endswith(f".{up}")), None
            )
            if layer is None:
                yield [(linear, 0)], indices
            else:
                mlps.setdefault(layer, []).append(indices)
        for layer, some in mlps.items():
            parts = [(self.linears[layer + up], 0) for up in (names.up, names.gate) if up]
            yield [*parts, (self.linears[layer + names.down], 1)], np.unique(np.concatenate(some))


def _checked(name: str, given: Sequence[int] | np.ndarray, outputs: int) -> np.ndarray:
    indices = np.asarray(given) if len(given) else np.empty(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(f"neurons of {name} are {shown(given)}: a list of whole numbers is meant")
    wrong = indices[(indices < 0) | (indices >= outputs)]
    if len(wrong):
        raise UserError(f"{name} has no neuron {wrong[0]}: it has {outputs}, from 0; the choice is another model's")
    return np.unique(indices).astype(np.int64)


def _upload(wanted: list[tuple[torch.Tensor, int, np.ndarray]]) -> list[Edit]:
    """One copy a device, for all its tensors."""
    edits = []
    for device in dict.fromkeys(tensor.device for tensor, _, _ in wanted):
        here = [(tensor, dim, indices) for tensor, dim, indices in wanted if tensor.device == device]
        flat = torch.from_numpy(np.concatenate([indices for _, _, indices in here]))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.split([len(indices) for _, _, indices in here])
        edits += [Edit(tensor, dim, part) for (tensor, dim, _), part in zip(here, parts, strict=True) if len(part)]
    return edits
