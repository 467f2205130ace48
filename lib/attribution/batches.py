"""Samples in batches of one shape: padding at the end of a sample, and whole padding samples at the end of a batch.

Suffixes: B samples of a batch, T tokens, K explained tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lib.base.errors import UserError

SHORT_TOKENS = 2048  # of a batch of short samples, where nobody says how many


@dataclass
class Batch:
    ids_BT: torch.Tensor
    length_B: torch.Tensor
    first: int  # its first sample
    real: int  # samples; the others fill the batch
    target_BK: torch.Tensor | None
    lengths: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def length_on(self, device: torch.device) -> torch.Tensor:
        if device not in self.lengths:
            self.lengths[device] = self.length_B.to(device, non_blocking=True)
        return self.lengths[device]

    def pinned(self) -> "Batch":
        target = None if self.target_BK is None else self.target_BK.pin_memory()
        return Batch(self.ids_BT.pin_memory(), self.length_B.pin_memory(), self.first, self.real, target)


def cut(
    samples: Sequence[Sequence[int]],
    width: int | None,
    size: int | None,
    targets: Any,
    every: bool,
    most: int | None,
    pin: bool,
) -> Iterator[Batch]:
    """`every`: targets are one a position. `most`: positions that the model has. `pin`: for copies that do not make the
    host wait for the device."""
    longest = max(len(s) for s in samples)
    width = min(width or -(-longest // 16) * 16, most or 1 << 30)
    if longest > width:
        raise UserError(f"a sample has {longest} tokens; a batch's rows, or the model's positions, are {width}")
    size = size or max(1, min(SHORT_TOKENS // width, len(samples)))
    given = None if targets is None else _targets(targets, len(samples))
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        ids, length = torch.zeros(size, width, dtype=torch.long), torch.ones(size, dtype=torch.long)
        for i, sample in enumerate(part):
            ids[i, : len(sample)] = torch.as_tensor(sample)
            length[i] = len(sample)
        target = None
        if given is not None:
            target = torch.full((size, width if every else given.shape[1]), -1)
            target[: len(part), : given.shape[1]] = given[first : first + size]
        batch = Batch(ids, length, first, len(part), target)
        yield batch.pinned() if pin else batch


def _targets(targets: Any, samples: int) -> torch.Tensor:
    found = torch.as_tensor(targets, dtype=torch.long)
    found = found[:, None] if found.dim() == 1 else found
    if len(found) != samples:
        raise UserError(f"{len(found)} targets for {samples} samples")
    return found
