"""Output neurons of a loaded model's linear layers set to 0 and back, in place, in a few launches a layer.

    pruner = Pruner(model, family)                                  # transformers' model, or the decoder's Weights
    with pruner.applied({"layers.3.mlp.up_proj": [5, 17]}):
        ...                                                         # pruned here, afterwards bit for bit as before

An MLP's neuron is one whichever of its layers names it (up, gate, fc1): its rows of up and gate, their biases, and its
column of down are 0. Any of them alone gives the same function; all together can be taken out for good. Of any other
layer a neuron is its row and its bias. Where two models share their tensors, it is done to one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lib.checkpoint.families import Family
from lib.models.decoder import Weights
from lib.pruning.linears import Rows, linears
from lib.pruning.together import Neurons, together


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

        outputs = {name: linear.weight.count for name, linear in self.linears.items()}
        for parts, indices in together(self.family, neurons, outputs):
            count += len(indices)
            for name, dim in parts:
                note(self.linears[name].weight, dim, indices)
                if dim == 0:
                    note(self.linears[name].bias, 0, indices)
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
