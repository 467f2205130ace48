"""Attribution of one cell's samples: relevance of neurons or weights by LRP, and Wanda's statistics, in one pass."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lib.attribution.experiment import Attribution, Part
from lib.base.errors import UserError
from lib.checkpoint.layers import short
from lib.inputs.samples import read_samples
from lib.inputs.verified import checked_model
from lib.run.command import Job
from lib.run.task import run_rows
from lib.store import Cell


def compute(this: Job) -> int:
    experiment = this.of(Attribution)
    return run_rows(this, lambda cell: load_kernel(this, experiment, cell))


def load_kernel(this: Job, experiment: Attribution, cell: Cell) -> tuple["AttributionKernel", dict[str, Any]]:
    """The cell's samples and model; says what it will take before it takes it."""
    cache, score = this.site.cache, experiment.score
    samples = read_samples(cache, experiment.input_of(cache, cell.name)).ids[: experiment.samples(cache, cell.name)]
    parts, batch = experiment.layout(cache), experiment.batch(cache, cell.name)

    import torch

    from lib.attribution.attribute import Attributor
    from lib.attribution.memory import plan_memory
    from lib.models.load import announce, device_name, free_memory, load_config, load_model, visible_devices

    found = checked_model(cache, experiment.model.id, experiment.model.revision)
    config, devices, kind = load_config(found.path), visible_devices(), getattr(torch, experiment.model.dtype)
    if score.tokens and max(score.tokens) >= config.vocab_size:
        raise UserError(
            f"score.tokens: {max(score.tokens)} is no token, the model has a vocabulary of {config.vocab_size}"
        )
    recompute = False
    if devices[0].type == "cuda":
        free = this.keep("free", found.path, lambda: free_memory(devices))  # before the model is there
        memory = plan_memory(
            config,
            found.parameters * kind.itemsize,
            {p.name: (p.outputs, p.inputs) for p in parts},
            level=score.level,
            scores=tuple(score.scores),
            batch=batch,
            itemsize=kind.itemsize,
            devices=len(devices),
            free=free,
            blocks=cell.total if score.level == "weight" else 1,
        )
        announce("attribution", memory, free)
        recompute = memory.recompute
    model = this.keep("model", found.path, lambda: load_model(found.path, experiment.model.dtype, "sdpa", devices))
    attributor = Attributor(
        model,
        rule=score.rule,
        layers=score.layers,
        level=score.level,
        scores=score.scores,
        target=score.target,
        wanda=score.wanda,
        batch=batch[0],
        width=batch[1],
        recompute=recompute,
    )
    names = [short(name) for name in attributor.linears]
    if names != [part.name for part in parts]:
        raise UserError(f"{found.path}: the model's layers are not those in its weights; run `make fetch` again")
    explained = experiment.explained(cache)
    return AttributionKernel(experiment, samples, parts, explained, attributor), {"device": device_name(devices[0])}


class AttributionKernel:
    def __init__(
        self, experiment: Attribution, samples: list[np.ndarray], parts: list[Part], explained: int, attributor: Any
    ) -> None:
        self.experiment, self.samples, self.parts, self.attributor = experiment, samples, parts, attributor
        self.explained = explained
        self.weight_level = experiment.score.level == "weight"

    def prepare(self, start: int, stop: int) -> Any:
        block = self.experiment.score.block
        return self.samples[start * block : stop * block] if self.weight_level else self.samples[start:stop]

    def compute(self, prepared: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        score = self.experiment.score
        targets = [score.tokens] * len(prepared) if score.target == "given" else None
        found = self.attributor.run(prepared, targets)
        counts, broken = self._broken(found)
        self._finite(broken)
        columns: dict[str, Any] = {}
        if self.weight_level:
            columns |= {"samples": np.array([len(prepared)]), "tokens": found.tokens.numpy().sum(keepdims=True)}
            spare = (0, score.block - len(prepared))
            if score.scores:
                columns["target"] = np.pad(self._target(found), (spare, (0, 0)), constant_values=-1)[None]
                columns["logit"] = np.pad(found.logit.numpy(), spare, constant_values=np.nan)[None]
        else:
            columns["tokens"] = found.tokens.numpy()
            if score.scores:
                columns |= {"target": self._target(found), "logit": found.logit.numpy()}
        columns["nonfinite"] = counts
        for kind in score.scores:
            values = getattr(found, kind)
            if self.weight_level:
                columns |= {f"{kind}/{short(name)}": _later(values, name) for name in found.layers}
            else:
                columns[kind] = _joined(values, found.layers)
        if score.wanda:
            counted = [n for n, p in zip(found.layers, self.parts, strict=True) if p.input_of == p.name]
            columns["sumsq"] = _joined(found.sumsq, counted)
            if self.weight_level:
                columns["sumsq"] = columns["sumsq"].astype(np.float64).sum(0, keepdims=True).astype(np.float32)
        facts = {"samples": len(prepared), "tokens": int(found.tokens.sum()), "nonfinite_values": sum(broken.values())}
        return columns, facts

    def _target(self, found: Any) -> np.ndarray:
        """Explained tokens; every cell has as many columns as the longest one's samples need."""
        target = found.target.numpy().astype(np.int32)
        return np.pad(target, ((0, 0), (0, self.explained - target.shape[1])), constant_values=-1)

    def _broken(self, found: Any) -> tuple[np.ndarray, dict[str, int]]:
        """NaN and infinite values of each row and layer, and of the layers that have any."""
        if self.weight_level:
            broken = found.nonfinite()
            return np.array([[broken.get(name, 0) for name in found.layers]]), broken
        counts = found.nonfinite_rows().numpy()
        return counts, {name: int(n) for name, n in zip(found.layers, counts.sum(0), strict=True) if n}

    def _finite(self, broken: dict[str, int]) -> None:
        if sum(broken.values()) > self.experiment.score.nonfinite:
            name, count = next(iter(broken.items()))
            raise UserError(
                f"{count} scores of {name} are NaN or infinite, and {sum(broken.values())} in {len(broken)} layers: "
                f"{self._why()}, or allow so many with score.nonfinite"
            )

    def _why(self) -> str:
        """One NaN spreads to the scores of all layers: its source is in the weights, or they overflow."""
        for name, weight in self.attributor.model.named_parameters():
            count = sum(int((~part.isfinite()).sum()) for part in weight.flatten().split(1 << 26))
            if count:
                return f"{name} is not finite in {count} of {weight.numel()} places; fetch the model again"
        return f"all weights are finite, so {self.experiment.model.dtype} overflows; try a wider model.dtype"


def _joined(values: dict[str, Any], names: list[str]) -> np.ndarray:
    """Layers side by side, on the host."""
    return np.concatenate([values[name].float().cpu().numpy() for name in names], 1)


def _later(values: dict[str, Any], name: str) -> Callable[[], np.ndarray]:
    """A layer's sums, brought to the host when the writer asks: the device is then at the next block, so the copy has a
    stream of its own."""

    def bring() -> np.ndarray:
        import torch

        sums = values.pop(name)
        with torch.cuda.stream(torch.cuda.Stream(sums.device) if sums.is_cuda else None):
            return sums.float().cpu().numpy()[None]

    return bring
