"""What belongs to a neuron: which rows and columns go with it, by names alone. Without torch."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from lib.base.errors import UserError, nearest, shown
from lib.checkpoint.families import Family

Neurons = Mapping[str, Sequence[int] | np.ndarray]  # layer -> indices of its outputs


def together(
    family: Family, neurons: Neurons, outputs: Mapping[str, int]
) -> Iterator[tuple[list[tuple[str, int]], np.ndarray]]:
    """([(layer, dim)], indices): rows (dim 0, and the bias with them) or columns (dim 1) of layers that go together.

    An MLP's neuron is one whichever of its layers names it: the rows of up and gate, and the column of down. `outputs`:
    every linear layer of the model, and how many neurons it has."""
    names = family.linears
    mlps: dict[str, list[np.ndarray]] = {}
    for name, given in neurons.items():
        check_known(name, outputs)
        indices = _checked(name, given, outputs[name])
        layer = next((name.removesuffix(up) for up in (names.up, names.gate) if up and name.endswith(f".{up}")), None)
        if layer is None:
            yield [(name, 0)], indices
        else:
            mlps.setdefault(layer, []).append(indices)
    for layer, some in mlps.items():
        rows = [(layer + up, 0) for up in (names.up, names.gate) if up]
        yield [*rows, (layer + names.down, 1)], np.unique(np.concatenate(some))


def check_known(name: str, have: Collection[str]) -> None:
    if name not in have:
        close = nearest(name, list(have))
        raise UserError(f"the model has no linear layer {name}{close}; what names it is another model's")


def _checked(name: str, given: Sequence[int] | np.ndarray, outputs: int) -> np.ndarray:
    indices = np.asarray(given) if len(given) else np.empty(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(f"neurons of {name} are {shown(given)}: a list of whole numbers is meant")
    wrong = indices[(indices < 0) | (indices >= outputs)]
    if len(wrong):
        raise UserError(f"{name} has no neuron {wrong[0]}: it has {outputs}, from 0; the choice is another model's")
    return np.unique(indices).astype(np.int64)
