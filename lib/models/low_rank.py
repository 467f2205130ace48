"""A low-rank adapter beside a decoder's weights: y = x W^T + (x A^T) B^T, unmerged, A and B as the decoder's type has
them. Those that share an input are one A; B is then block by block, with the scale inside.

Suffixes as in decoder; R ranks of those together."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lib.base.errors import UserError, one_line, some
from lib.checkpoint.families import Family, Shape

Pair = tuple[torch.Tensor, torch.Tensor]  # A [R, in], B [out, R]


@dataclass(frozen=True)
class LowRank:
    """A layer's."""

    qkv: Pair
    o: Pair
    gate_up: Pair
    down: Pair


def add_low_rank(out_MX: torch.Tensor, x_MD: torch.Tensor, pair: Pair) -> None:
    a_RD, b_XR = pair
    out_MX.addmm_(x_MD @ a_RD.t(), b_XR.t())


def read_peft(folder: Path) -> tuple[dict[str, torch.Tensor], int, float]:
    """An adapter's tensors by their names, its rank, and what B A is multiplied by."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} holds no adapter that can be read ({one_line(e)}); run `make verify`") from None
    return tensors, rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def read_low_rank(
    folder: Path, family: Family, shape: Shape, dtype: torch.dtype, devices: list[torch.device]
) -> list[LowRank]:
    """Of peft's folder; `devices`: each layer's. A linear layer that has no adapter gets zeros."""
    tensors, rank, scale = read_peft(folder)
    left, names, q, kv = dict(tensors), family.linears, shape.heads * shape.head, shape.kv_heads * shape.head
    d, inner = shape.hidden, shape.inner

    def pair(layer: int, device: torch.device, inputs: int, linears: Mapping[str, int]) -> Pair:
        """`linears`: name -> rows of its result."""
        a = torch.zeros(rank * len(linears), inputs)
        b = torch.zeros(sum(linears.values()), rank * len(linears))
        at = 0
        for number, (name, rows) in enumerate(linears.items()):
            own = slice(number * rank, (number + 1) * rank)
            for letter, place in (("A", a[own]), ("B", b[at : at + rows, own])):
                key = f"base_model.model.{family.names.stack}.{layer}.{name}.lora_{letter}.weight"
                found = left.pop(key, None)
                if found is not None and found.shape != place.shape:
                    raise UserError(
                        f"{folder}: {key} has the shape {tuple(found.shape)}, and the model wants {tuple(place.shape)}"
                    )
                if found is not None:
                    place.copy_(found)
            at += rows
        return a.to(device, dtype), (b * scale).to(device, dtype)

    layers = [
        LowRank(
            pair(i, device, d, {names.q: q, names.k: kv, names.v: kv}),
            pair(i, device, q, {names.o: d}),
            pair(i, device, d, {names.gate or "": inner, names.up: inner}),
            pair(i, device, inner, {names.down: d}),
        )
        for i, device in enumerate(devices)
    ]
    if left:
        raise no_place(folder, left)
    must_be_pairs(folder, tensors)
    return layers


def must_be_pairs(folder: Path, names: Iterable[str]) -> None:
    """B without its A, or the other way round, would change nothing, without a word."""
    letters: dict[str, set[str]] = {}
    for name in names:
        layer, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        letters.setdefault(layer, set()).add(letter)
    if halves := [layer.removeprefix("base_model.model.") for layer, both in letters.items() if len(both) < 2]:
        raise UserError(f"{folder} holds only one of two matrices of {some(halves)}; run `make verify`")


def no_place(folder: Path, names: Iterable[str]) -> UserError:
    return UserError(f"{folder} has {some(names)}, which the model has no place for: it is another model's adapter")
