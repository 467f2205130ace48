"""Unstructured pruning: which weights go by their scores, out of a loaded model and, read from its folder, back again.

The lowest of each output row (Wanda's way), of each layer, of all layers together, or N of every M inputs. Ties go by
index, as in a stable sort. Suffixes: J outputs, I inputs, B blocks, M inputs of a block."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lib.base.errors import UserError
from lib.checkpoint.families import Family
from lib.checkpoint.headers import folder_tensors
from lib.checkpoint.layers import linear_weights
from lib.models.decoder import Weights
from lib.models.weights import THREADS, copy_tensor
from lib.pruning.linears import linears
from lib.pruning.scores import Scores, whole
from lib.pruning.threshold import find_threshold, masks
from lib.pruning.together import check_known

CHUNK_VALUES = 1 << 26  # scores ranked at once


@dataclass(frozen=True)
class Lowest:
    """A share of each row, of each layer, or of all scored layers."""

    scope: Literal["row", "layer", "global"]
    share: float


@dataclass(frozen=True)
class Blocks:
    """N:M: of every `of` inputs that follow each other, the lowest `zeros`."""

    zeros: int
    of: int


def masks_by(
    scores: Sequence[Scores], rule: Lowest | Blocks, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer by layer what goes, bool [J, I] on the device."""
    if isinstance(rule, Blocks) or rule.scope == "row":
        for one in scores:
            yield one.name, _mask_of(one.name, whole(one, device), rule)
    else:
        for group in [[one] for one in scores] if rule.scope == "layer" else [scores]:
            count = count_of(rule.share, sum(prod(one.shape) for one in group))
            for name, mask in masks(group, find_threshold(group, count)):
                yield name, torch.from_numpy(mask).to(device)


def _mask_of(name: str, scores_JI: torch.Tensor, rule: Lowest | Blocks) -> torch.Tensor:
    """Of a layer whose rows, or blocks, are ranked each by itself."""
    outputs, inputs = scores_JI.shape
    if isinstance(rule, Blocks) and (not 0 <= rule.zeros <= rule.of or inputs % max(rule.of, 1)):
        raise UserError(f"{name} has {inputs} inputs: {rule.zeros} of every {rule.of} cannot be pruned")
    if bool(scores_JI.isnan().any()):
        raise UserError(f"scores of {name} hold NaN, which has no place in an order; compute them again")
    if isinstance(rule, Blocks):
        parts = scores_JI.reshape(-1, rule.of).split(max(1, CHUNK_VALUES // rule.of))
        return torch.cat([_ranks_in_blocks(part) < rule.zeros for part in parts]).view(outputs, inputs)
    count, step = count_of(rule.share, inputs), max(1, CHUNK_VALUES // inputs)
    return torch.cat([_lowest_of_rows(part, count) for part in scores_JI.split(step)])


def count_of(share: float, total: int) -> int:
    """That share of so many, rounded down, as it is written: 0.29 of 100 is 29, though 0.29 * 100 is a little less."""
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share:g} of the weights: it has to lie between 0 and 1")
    return int(Fraction(repr(float(share))) * total)


def _lowest_of_rows(scores_JI: torch.Tensor, count: int) -> torch.Tensor:
    """Without sorting: the count-th lowest, what is below, and the first of those equal to it."""
    if count == 0:
        return torch.zeros_like(scores_JI, dtype=torch.bool)
    last_J1 = scores_JI.kthvalue(count, 1, keepdim=True).values
    below_JI, equal_JI = scores_JI < last_J1, scores_JI == last_J1
    left_J1 = count - below_JI.sum(1, keepdim=True)
    return below_JI | (equal_JI & (equal_JI.cumsum(1, dtype=torch.int32) <= left_J1))


def _ranks_in_blocks(scores_BM: torch.Tensor) -> torch.Tensor:
    """Each score's place among its block's: how many are lower, or equal and before it."""
    ranks_BM = torch.zeros_like(scores_BM, dtype=torch.int16)
    for m in range(scores_BM.shape[1]):
        ranks_BM += scores_BM[:, m : m + 1] < scores_BM
        ranks_BM[:, m + 1 :] += scores_BM[:, m : m + 1] == scores_BM[:, m + 1 :]
    return ranks_BM


class WeightPruner:
    """Of a loaded model and the folder that it came from, which is read again to undo: no copy is held."""

    def __init__(self, model: nn.Module | Weights, family: Family, folder: Path) -> None:
        self.linears, self.folder = linears(model, family), folder
        stored = folder_tensors(folder)
        self.stored = {name: stored[there] for name, there in linear_weights(stored).items()}
        for name, linear in self.linears.items():
            shape = tuple(linear.weight.part.shape)
            if name not in self.stored or self.stored[name].shape != shape:
                raise UserError(f"{folder} holds no {name} of shape {shape}: it is not what the model was loaded from")
        self._touched: dict[str, None] = {}

    @torch.no_grad()
    def zero(self, name: str, mask_JI: torch.Tensor) -> int:
        """Set a layer's weights to 0 where the mask says so; how many."""
        check_known(name, self.linears)
        weight_JI = self.linears[name].weight.part
        if mask_JI.shape != weight_JI.shape:
            raise UserError(
                f"{name} is {tuple(weight_JI.shape)}, its scores are {tuple(mask_JI.shape)}: they are another model's"
            )
        self._touched[name] = None
        weight_JI.masked_fill_(mask_JI.to(weight_JI.device), 0)
        return int(mask_JI.sum())

    @torch.no_grad()
    def restore(self) -> None:
        """Read from the folder what was changed."""
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(self._read, name) for name in self._touched]:
                done.result()
        self._touched = {}

    @contextmanager
    def applied(self, found: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, int]]:
        """Layer -> weights that are 0 inside."""
        try:
            yield {name: self.zero(name, mask) for name, mask in found}
        finally:
            self.restore()

    def _read(self, name: str) -> None:
        copy_tensor(self.stored[name], self.linears[name].weight.part)
