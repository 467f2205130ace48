"""Names of linear layers: from a model's modules and from a checkpoint's headers alike."""

from collections.abc import Iterable, Mapping, Sequence

from lib.base.errors import UserError, nearest
from lib.checkpoint.headers import Stored

# In the order in which a layer computes them.
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # they read the same input


def short(name: str) -> str:
    """layers.3.mlp.up_proj, whatever stands before it in a family's own names."""
    return name[name.index("layers.") :]


def linear_weights(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Linear layer of the decoder -> the name of its weight among a folder's tensors."""
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if "layers." in name and name.endswith(".weight") and len(tensor.shape) == 2:
            layer = short(name).removesuffix(".weight")
            if layer in found:
                raise UserError(
                    f"the weights hold {layer} twice, as {found[layer]} and as {name}; remove one of the two"
                )
            found[layer] = name
    return found


def place(name: str) -> tuple[int, int]:
    """Sorts names in forward order."""
    layer, last = int(short(name).split(".")[1]), name.rpartition(".")[2]
    return layer, ORDER.index(last) if last in ORDER else len(ORDER)


def choose(names: Iterable[str], wanted: str | Sequence[str]) -> list[str]:
    """Those that `wanted` names, in forward order: "all", or names or parts (up_proj, mlp.down_proj, layers.3)."""
    have = sorted(names, key=place)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if wanted == ["all"]:
        return have
    kinds = sorted({name.rpartition(".")[2] for name in have})
    for part in wanted:
        if not any(f".{part}." in f".{name}." for name in have):
            raise UserError(f"no linear layer is called '{part}'; there are: {', '.join(kinds)}{nearest(part, kinds)}")
    return [name for name in have if any(f".{part}." in f".{name}." for part in wanted)]


def shared_inputs(names: Sequence[str]) -> dict[str, str]:
    """Layer -> the layer under whose name their common input is counted: the last of q, k, v, and of gate, up."""
    found = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        group = next((g for g in TOGETHER if last in g), (last,))
        found[name] = f"{parent}.{[part for part in group if f'{parent}.{part}' in names][-1]}"
    return found
