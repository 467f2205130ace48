"""Wanda as its authors run it: each block is calibrated on what the blocks before it give once they are pruned.

A block's linear layers see the samples, sums of squares of their inputs are gathered in float32, each layer's lowest
|W| * norm go, and what the block gives now is the next one's input. Of a transformers model, in place; undone by
reading the folder again (WeightPruner.restore). In memory: the samples' hidden states, once."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from lib.attribution.wanda import norms
from lib.base.errors import UserError
from lib.checkpoint.families import Family, last
from lib.models.tokens import must_know, vocabulary_of
from lib.pruning.scores import Wanda
from lib.pruning.weights import Blocks, Lowest, WeightPruner, masks_by

More = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is given beside the hidden states


class _Reached(Exception):
    """The first block was called: what follows it is not wanted."""


@torch.no_grad()
def sequential_wanda(
    model: nn.Module,
    family: Family,
    pruner: WeightPruner,
    samples: Sequence[Sequence[int]],
    rule: Lowest | Blocks,
    done: Callable[[int, int], None] = lambda block, blocks: None,
) -> dict[str, int]:
    """Layer -> weights that are 0 now. `samples`: token ids, each computed by itself. `done` is told of each block."""
    if isinstance(rule, Lowest) and rule.scope == "global":
        raise UserError(
            "sequential Wanda cannot rank all layers together: when a block is pruned, the later ones have no scores "
            "yet; choose rows, layers or blocks of inputs"
        )
    if not samples or not all(samples):
        raise UserError("sequential Wanda needs samples that hold tokens; prepare general text to calibrate on")
    every = [token for ids in samples for token in ids]
    must_know(min(every), max(every), vocabulary_of(model))
    hidden, more = _first_inputs(model, family, samples)
    blocks, zeros = list(model.get_submodule(family.names.stack).children()), {}
    for number, block in enumerate(blocks):
        for name, sumsq_I in _sums_of_squares(block, hidden, more).items():
            weight_JI, full = block.get_parameter(f"{name}.weight"), f"{last(family.names.stack)}.{number}.{name}"
            scores = Wanda(full, weight_JI, norms(sumsq_I, len(every), len(samples), "rms"))
            for _, mask in masks_by([scores], rule, weight_JI.device):
                zeros[full] = pruner.zero(full, mask)
        hidden = [_output(block, x, how) for x, how in zip(hidden, more, strict=True)]
        done(number + 1, len(blocks))
    return zeros


def _first_inputs(
    model: Any, family: Family, samples: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[More]]:
    """Of each sample what the first block is given: hidden states, and all else, which is the same for one length."""
    hidden, of_length = [], {}

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        of_length.setdefault(args[0].shape[1], (args[1:], kwargs))
        raise _Reached

    first = next(model.get_submodule(family.names.stack).children())
    hook = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in samples:
            with suppress(_Reached):
                model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        hook.remove()
    return hidden, [of_length[len(ids)] for ids in samples]


def _sums_of_squares(block: nn.Module, hidden: list[torch.Tensor], more: list[More]) -> dict[str, torch.Tensor]:
    """Of each linear layer's inputs over all tokens, float32 [I], while the block is as dense as it was."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, module: nn.Linear, args: tuple[Any, ...]) -> None:
        squares_I = args[0].float().square().flatten(0, -2).sum(0)
        found[name] = found[name] + squares_I if name in found else squares_I

    linears = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(partial(add, name)) for name, m in linears]
    try:
        for x, how in zip(hidden, more, strict=True):
            _output(block, x, how)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name, _ in linears}


def _output(block: nn.Module, hidden: torch.Tensor, more: More) -> torch.Tensor:
    out = block(hidden, *more[0], **more[1])
    return out[0] if isinstance(out, tuple) else out
