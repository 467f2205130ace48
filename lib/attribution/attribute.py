"""Scores of samples: batches of one fixed shape through a patched model, each layer told as the gradient passes.

A sample's scores depend on itself and on the batch's shape alone: padding stands at its end, where causal attention
never looks, and carries no gradient.

Suffixes: S samples, B samples of a batch, T tokens, D hidden, K explained tokens, J outputs, I inputs of a layer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.attribution.batches import Batch, cut
from lib.attribution.patch import explained_family, hooks, linear_layers, must_be_plain, patched
from lib.attribution.rules import Tap
from lib.attribution.scores import abs_neurons, add_weights, signed_neurons, squares
from lib.base.errors import UserError
from lib.checkpoint.families import last
from lib.checkpoint.layers import choose, shared_inputs
from lib.models.plain_ops import accurate
from lib.models.rope import positions
from lib.models.tokens import must_know, vocabulary_of

LEVELS = ("neuron", "weight")
SCORES = ("signed", "abs")
TARGETS = ("last", "all", "given")
# Where a library's attention is used (OPT, masks): those whose gradient can add up in a fixed order; not cuDNN's.
REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEAD_ROWS = 1024  # positions whose logits are made at once, where every position is explained


@dataclass
class Scores:
    """Neuron level: a row a sample, [S, J]. Weight level: sums over the samples, [J, I]."""

    layers: list[str]  # in forward order
    tokens: torch.Tensor  # [S]
    target: torch.Tensor  # [S, K] explained tokens; -1 where a sample has fewer
    logit: torch.Tensor  # [S] their logits' sum: what was explained
    signed: dict[str, torch.Tensor] = field(default_factory=dict)
    abs: dict[str, torch.Tensor] = field(default_factory=dict)
    sumsq: dict[str, torch.Tensor] = field(default_factory=dict)  # [S, I] of each layer's input; shared by some layers

    def nonfinite(self) -> dict[str, int]:
        """How many values of each layer are NaN or infinite; layers without any are left out."""
        counts = {name: sum(int(_broken(v).sum()) for v in self._of(name)) for name in self.layers}
        return {name: count for name, count in counts.items() if count}

    def nonfinite_rows(self) -> torch.Tensor:
        """Neuron level: the same for each sample and layer, [S, layers]."""
        counts = (torch.stack([_broken(v).sum(1).cpu() for v in self._of(name)]).sum(0) for name in self.layers)
        return torch.stack(list(counts), 1)

    def _of(self, name: str) -> list[torch.Tensor]:
        return [part[name] for part in (self.signed, self.abs, self.sumsq) if name in part]


def _broken(values: torch.Tensor) -> torch.Tensor:
    return ~values.isfinite()


class Attributor:
    def __init__(
        self,
        model: Any,
        *,
        rule: str = "attnlrp",
        layers: str | Sequence[str] = ("up_proj",),
        level: str = "neuron",
        scores: Sequence[str] = SCORES,
        target: str = "last",
        wanda: bool = False,
        width: int | None = None,
        batch: int | None = None,
        recompute: bool = False,
    ) -> None:
        """`width` and `batch` are the shape of every batch: tokens of a sample, and samples. By default the longest
        sample decides, and short samples share a batch of about 2,048 tokens."""
        for what, value, valid in (("level", level, LEVELS), ("target", target, TARGETS)):
            if value not in valid:
                raise UserError(f"{what} '{value}' is not one of {', '.join(valid)}")
        if not set(scores) <= set(SCORES) or not (scores or wanda):
            raise UserError(f"scores must be among {', '.join(SCORES)}, or none of them with Wanda's statistics alone")
        self.model, self.rule, self.level, self.target = model, rule, level, target
        self.scores, self.wanda, self.recompute = tuple(scores), wanda, recompute
        self.width, self.batch = width, batch
        self.family = explained_family(model)
        must_be_plain(model)
        if hooks(model.get_output_embeddings()):
            raise UserError("the output head has a hook, which would not be run; remove it first")
        have = linear_layers(model)
        self.linears = {name: have[name] for name in choose(self.family, have, layers)}
        linears = self.family.linears
        cut = {linears.q, linears.k, linears.gate} if rule == "cp_lrp" else set()  # these get no relevance at all
        self.cut = {last(name) for name in cut if name}
        if self.scores and {last(name) for name in self.linears} <= self.cut:
            raise UserError(
                f"cp_lrp gives {', '.join(sorted(self.cut))} no relevance: name other layers, or another rule"
            )
        self.input_of = shared_inputs(self.family, list(self.linears))
        self.devices = list(dict.fromkeys(m.weight.device for m in have.values()))
        self.dtype = accurate(next(iter(self.linears.values())).weight.dtype)

    def run(self, samples: Sequence[Sequence[int]], targets: Any = None) -> Scores:
        """Scores of the samples; `targets` (token ids, [S] or [S, K]) pins what is explained."""
        if self.target == "given" and targets is None:
            raise UserError("target 'given' needs the tokens to explain")
        if not len(samples) or not all(len(s) for s in samples):
            raise UserError("there is no sample, or one without a token")
        pin = self.devices[0].type == "cuda"
        batches = list(
            cut(samples, self.width, self.batch, targets, self.target == "all", positions(self.model.config), pin)
        )
        vocabulary = vocabulary_of(self.model)
        for batch in batches:
            must_know(int(batch.ids_BT.min()), int(batch.ids_BT.max()), vocabulary)
            if batch.target_BK is not None:  # -1 where a sample has fewer
                must_know(0, int(batch.target_BK.max()), vocabulary)
        rows = sum(len(b.ids_BT) for b in batches)
        first = batches[0]
        explained = 1 if first.target_BK is None else first.target_BK.shape[1]
        explained = first.ids_BT.shape[1] if self.target == "all" else explained
        found = Scores(
            list(self.linears),
            torch.tensor([len(s) for s in samples]),
            torch.full((rows, explained), -1, dtype=torch.long),
            torch.zeros(rows, dtype=self.dtype),
        )
        for name, linear in self.linears.items():
            out, device = linear.weight.shape[0], linear.weight.device
            size = (rows, out) if self.level == "neuron" else tuple(linear.weight.shape)
            for kind in self.scores:
                getattr(found, kind)[name] = torch.zeros(size, dtype=self.dtype, device=device)
        if self.wanda:
            for name in dict.fromkeys(self.input_of.values()):
                linear = self.linears[name]
                size = (rows, linear.weight.shape[1])
                found.sumsq[name] = torch.zeros(size, dtype=self.dtype, device=linear.weight.device)
        with _frozen(self.model):
            if self.scores:
                self._explain_all(batches, found)
            else:
                self._forward_all(batches, found)
        return self._trimmed(found, len(samples))

    def _explain_all(self, batches: list[Batch], found: Scores) -> None:
        now: list[Batch] = []  # the batch whose gradient passes
        calls = dict.fromkeys(self.linears, 0)
        need_output = self.level == "neuron" and "signed" in self.scores
        taps = {name: Tap(partial(self._tell, name, now, found, calls), need_output) for name in self.linears}
        group = 1 if len(self.devices) == 1 else 2 * len(self.devices)  # batches in flight, so that all devices work
        with patched(self.model, self.rule, taps, self.recompute), torch.enable_grad(), sdpa_kernel(REPEATABLE):
            for at in range(0, len(batches), group):
                passed = [(b, self._explained(b, found)) for b in batches[at : at + group]]
                for batch, explained in passed:
                    now[:] = [batch]
                    with _same_bits(self.devices[0]):
                        explained.backward()
        found.logit, found.target = found.logit.cpu(), found.target.cpu()
        for name, count in calls.items():
            if count != len(batches) and not (count == 0 and last(name) in self.cut and name not in found.sumsq):
                raise UserError(
                    f"{name} was passed by {count} of {len(batches)} gradients: no score of it would be right"
                )

    def _tell(
        self,
        name: str,
        now: list[Batch],
        found: Scores,
        calls: dict[str, int],
        x: torch.Tensor,
        y: torch.Tensor | None,
        dy: torch.Tensor,
    ) -> None:
        """A layer's part of the scores, while the gradient is there."""
        batch, weight = now[0], self.linears[name].weight
        calls[name] += 1
        x_BTI, dy_BTJ = (v.unflatten(0, (len(batch.ids_BT), -1)) if v.dim() == 2 else v for v in (x, dy))
        rows = slice(batch.first, batch.first + len(batch.ids_BT))
        if name in found.sumsq:
            found.sumsq[name][rows] = squares(x_BTI, batch.length_on(x.device))
        if self.level == "weight":
            for kind in self.scores:
                add_weights(getattr(found, kind)[name], x_BTI, dy_BTJ, weight, kind == "abs")
            return
        if y is not None:
            found.signed[name][rows] = signed_neurons(y.view(dy_BTJ.shape), dy_BTJ)
        if "abs" in self.scores:
            found.abs[name][rows] = abs_neurons(x_BTI, dy_BTJ, weight)

    def _forward_all(self, batches: list[Batch], found: Scores) -> None:
        """Wanda's statistics alone: no gradient, no head."""
        now: list[Batch] = []  # the batch that passes

        def keep(name: str, module: nn.Module, args: Any) -> None:
            batch, x = now[0], args[0]
            x_BTI = x if x.dim() == 3 else x.unflatten(0, (len(batch.ids_BT), -1))
            found.sumsq[name][batch.first : batch.first + len(x_BTI)] = squares(x_BTI, batch.length_on(x.device))

        with ExitStack() as hooks, patched(self.model, "gradient"), torch.no_grad():
            for name in found.sumsq:
                hooks.callback(self.linears[name].register_forward_pre_hook(partial(keep, name)).remove)
            for batch in batches:
                now[:] = [batch]
                self._hidden(batch)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        ids = batch.ids_BT.to(self.devices[0], non_blocking=True)
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def _explained(self, batch: Batch, found: Scores) -> torch.Tensor:
        """The sum of the explained logits. A logit is its token's row of the head times the hidden state, so its
        gradient needs no gradient of the logits."""
        hidden_BTD, head = self._hidden(batch), self.model.get_output_embeddings()
        device, size = hidden_BTD.device, hidden_BTD.shape
        length_B = batch.length_on(device)
        if self.target == "all":
            picked = hidden_BTD.flatten(0, 1)
            real = (torch.arange(size[1], device=device)[None] < length_B[:, None]).flatten()
        else:
            picked = hidden_BTD[torch.arange(size[0], device=device), length_B - 1]
            real = torch.ones(size[0], dtype=torch.bool, device=device)
        if batch.target_BK is None:
            with torch.no_grad():
                best = [head(part).argmax(-1) for part in picked.split(HEAD_ROWS)]
            target_BK = torch.where(real, torch.cat(best), -1).view(size[0], -1)
        else:
            target_BK = batch.target_BK.to(device, non_blocking=True)
        # Masks in place of indices by truth: those would wait for the device.
        row_B = torch.arange(size[0], device=device)
        counted_BK = (target_BK >= 0) & (row_B < batch.real)[:, None]
        weight_BKD = head.weight[target_BK.clamp(min=0)].to(self.dtype)
        logit_BK = (picked.view(size[0], -1, size[2]).to(self.dtype) * weight_BKD).sum(-1)
        if getattr(head, "bias", None) is not None:
            logit_BK = logit_BK + head.bias[target_BK.clamp(min=0)]
        logit_BK = torch.where(counted_BK, logit_BK, 0.0)
        rows = slice(batch.first, batch.first + size[0])
        if found.logit.device != device:
            found.logit, found.target = found.logit.to(device), found.target.to(device)
        found.logit[rows] = logit_BK.detach().sum(1)
        found.target[rows] = target_BK
        return logit_BK.sum()

    def _trimmed(self, found: Scores, samples: int) -> Scores:
        """Without the rows that filled the last batch; a shared input under each layer's name."""
        found.target, found.logit = found.target[:samples], found.logit[:samples]
        if self.level == "neuron":
            for part in (found.signed, found.abs):
                part.update({name: value[:samples] for name, value in part.items()})
        if self.wanda:
            found.sumsq = {name: found.sumsq[first][:samples] for name, first in self.input_of.items()}
        return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def _same_bits(device: torch.device) -> Iterator[None]:
    """Torch's own attention adds its gradient up in a fixed order meanwhile; with warn_only it would not."""
    if device.type != "cuda":
        yield
        return
    deterministic: Any = torch.utils.deterministic  # its attribute is made when the module is read
    fill = deterministic.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    deterministic.fill_uninitialized_memory = False  # else every torch.empty is written
    torch.use_deterministic_algorithms(True)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or ":4096:8"  # torch asks for it; it matters with many streams
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        deterministic.fill_uninitialized_memory = fill
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
