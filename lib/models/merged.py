"""A base's weights with an adapter inside: W + scale B A, computed in float32 and rounded once.

Always from the base's own files, never from what an engine holds: nothing adds up, however many adapters follow each
other. What the adapter before has changed and the next one does not is the base's again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from lib.base.errors import UserError
from lib.checkpoint.families import family_in, last
from lib.models.engine import Adapter
from lib.models.low_rank import must_be_pairs, no_place, read_peft
from lib.models.weights import model_tensors

Named = tuple[str, torch.Tensor]  # as the base's files call it
Pair = dict[str, torch.Tensor]  # "A" [R, in], "B" [out, R]


class Merging:
    """What an engine has to load, to have another adapter inside than it has."""

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = Path(folder), dtype, device
        self.stored = model_tensors(self.folder, tied=False)
        together = family_in(self.folder, "has no place for an adapter here; these have").linears.together
        self.mates = {name: group for group in together for name in group}
        self.inside: Adapter | Literal["half"] | None = None
        self.changed: dict[str, None] = {}  # linear layers that are not the base's

    def turn(self, adapter: Adapter | None) -> Iterator[Named]:
        """Whole linear layers, biases too, with all that share their input: some engines keep these as one tensor, and
        take it whole or not at all."""
        if adapter == self.inside:
            return
        pairs, scale = self._pairs(Path(adapter.folder)) if adapter else ({}, 0.0)
        wanted = {mate: None for layer in pairs for mate in self._mates(layer)}
        self.changed |= wanted
        self.inside = "half"  # until all of it was taken
        for layer in self.changed:
            weight = self._read(f"{layer}.weight").to(self.device, torch.float32)
            if layer in pairs:
                b_XR, a_RD = (pairs[layer][one].to(self.device, torch.float32) for one in "BA")
                weight = torch.addmm(weight, b_XR, a_RD, alpha=scale)
            yield f"{layer}.weight", weight.to(self.dtype)
            if f"{layer}.bias" in self.stored:
                yield f"{layer}.bias", self._read(f"{layer}.bias").to(self.device, self.dtype)
        self.inside, self.changed = adapter, wanted

    def _pairs(self, folder: Path) -> tuple[dict[str, Pair], float]:
        tensors, rank, scale = read_peft(folder)
        found: dict[str, Pair] = {}
        for name, tensor in tensors.items():
            layer, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            stored = self.stored.get(f"{layer}.weight")
            if matrix not in ("A", "B") or stored is None or last(layer) not in self.mates:
                raise no_place(folder, [name])
            wants = (rank, stored.shape[1]) if matrix == "A" else (stored.shape[0], rank)
            if tensor.shape != wants:
                raise UserError(f"{folder}: {name} has the shape {tuple(tensor.shape)}, and the model wants {wants}")
            found.setdefault(layer, {})[matrix] = tensor
        must_be_pairs(folder, tensors)
        return found, scale

    def _mates(self, layer: str) -> list[str]:
        own = last(layer)
        return [f"{layer.removesuffix(own)}{mate}" for mate in self.mates[own]]

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.stored[name].path, "pt") as file:
            return file.get_tensor(name)
