"""Names of linear layers: from a model's modules and from a checkpoint's headers alike."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lib.base.errors import UserError, nearest
from lib.checkpoint.families import FAMILIES, Family, last
from lib.checkpoint.headers import Stored

_STACKS = "|".join(sorted({re.escape(last(family.names.stack)) for family in FAMILIES.values()}))
_LAYER = re.compile(rf"(?:^|\.)((?:{_STACKS})\.(\d+)\..+)")


def short(name: str) -> str:
    """layers.3.mlp.up_proj, whatever stands before it in a family's own names."""
    found = _LAYER.search(name)
    assert found, f"{name} is in no layer"
    return found[1]


def linear_weights(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Linear layer of the decoder -> the name of its weight among a folder's tensors."""
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if _LAYER.search(name) and name.endswith(".weight") and len(tensor.shape) == 2:
            layer = short(name).removesuffix(".weight")
            if layer in found:
                raise UserError(
                    f"the weights hold {layer} twice, as {found[layer]} and as {name}; remove one of the two"
                )
            found[layer] = name
    return found


def choose(family: Family, names: Iterable[str], wanted: str | Sequence[str]) -> list[str]:
    """Those that `wanted` names, in forward order: "all", or names or parts (up_proj, mlp.down_proj, layers.3)."""
    have = sorted(names, key=lambda name: _place(family, name))
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if wanted == ["all"]:
        return have
    kinds = sorted({last(name) for name in have})
    for part in wanted:
        if not any(f".{part}." in f".{name}." for name in have):
            raise UserError(f"no linear layer is called '{part}'; there are: {', '.join(kinds)}{nearest(part, kinds)}")
    return [name for name in have if any(f".{part}." in f".{name}." for part in wanted)]


def _place(family: Family, name: str) -> tuple[int, int]:
    """Sorts names in forward order."""
    found, order = _LAYER.search(name), family.linears.order
    return int(found[2]) if found else 0, order.index(last(name)) if last(name) in order else len(order)


def shared_inputs(family: Family, names: Sequence[str]) -> dict[str, str]:
    """Layer -> the layer under whose name their common input is counted: the last of q, k, v, and of gate, up."""
    found = {}
    for name in names:
        parent = name.rpartition(".")[0]
        group = next((g for g in family.linears.together if last(name) in g), (last(name),))
        found[name] = f"{parent}.{[part for part in group if f'{parent}.{part}' in names][-1]}"
    return found
