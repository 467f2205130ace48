"""The fast trainers: one resident base, one adapter at a time, one optimiser step a call."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from lib.checkpoint.families import family_of
from lib.lora.adapter import Adapter, clipped
from lib.lora.base import Base, is_trained, load_base, load_stages, trained
from lib.lora.batches import FINE, GRAIN, Micro, micro_batches, round_up
from lib.lora.memory import plan_training
from lib.lora.peft_form import MOMENTS
from lib.lora.recipe import Lora
from lib.lora.relay import ENDS, EVEN, Ends
from lib.lora.rows import Row
from lib.lora.space import Size
from lib.lora.stages import Stages
from lib.lora.step import Step
from lib.models.load import announce, free_memory, load_config, visible_devices

CPU_TOKENS = 2048  # of a micro-batch there
CONTEXT = 512 << 20  # of a GPU, for CUDA itself
MOST_RANK, HEADS = 64, (16, 32, 64, 128)  # that the kernels are built for; beyond 16 their speed is not measured


class Resident(ABC):
    """Adapters on bases that stay loaded, one after the other through the model. `most`: tokens of a micro-batch; a
    step with more of them takes several."""

    grain: int = GRAIN
    ends: Ends = EVEN

    def __init__(self, adapters: Sequence[Adapter], lora: Lora, most: int) -> None:
        self.adapters, self.lora, self.most = adapters, lora, most
        self._ahead: tuple[Sequence[Row], list[Micro]] = ((), [])

    def begin(self, seed: int) -> None:
        for adapter in self.adapters:
            adapter.begin(seed)

    @abstractmethod
    def _gradient(self, micros: Sequence[Micro], share: float) -> torch.Tensor:
        """Of all micro-batches, in their order, into the adapters; the loss."""

    @torch.no_grad()
    def step(
        self, rows: Sequence[Row], learning_rate: float, number: int, following: Sequence[Row] = ()
    ) -> dict[str, float]:
        """`following`: the rows of the step after this one, laid out while the devices compute."""
        lora, scored = self.lora, sum(row.scored for row in rows)
        loss = self._gradient(self._ahead[1] if self._ahead[0] is rows else self._laid_out(rows), 1 / scored)
        norm, shrink = clipped(self.adapters, lora.clip)
        for one in self.adapters:
            here = shrink.to(one.base.device)
            one.update(learning_rate, number, here, lora.betas, lora.eps, lora.weight_decay)
        tokens = sum(len(row.ids) for row in rows)
        self._ahead = following, self._laid_out(following)
        both = torch.stack([loss, norm]).tolist()  # waits for the devices
        return {"loss": both[0], "grad_norm": both[1], "tokens": tokens, "scored": scored}

    def _laid_out(self, rows: Sequence[Row]) -> list[Micro]:
        return list(micro_batches(rows, self.most, self.grain, self.ends)) if rows else []

    def state(self) -> dict[str, torch.Tensor]:
        """Of whatever devices: the names and values are those of the model."""
        return {
            f"{kind}{name}": one
            for adapter in self.adapters
            for kind, flat in _flats(adapter)
            for name, one in adapter.named(flat.cpu().clone())
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for adapter in self.adapters:
            for kind, flat in _flats(adapter):
                for name, one in adapter.named(flat):
                    one.copy_(state[kind + name])
            adapter.place()


def _flats(adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state holds, and what stands before its names."""
    return zip(("", *MOMENTS), (adapter.values, adapter.first, adapter.second), strict=True)


class FastTrainer(Resident):
    """On one device. `size`: of the largest micro-batch."""

    def __init__(self, base: Base, lora: Lora, size: Size, rows: int) -> None:
        self.base, self.size, self.adapter = base, size, Adapter(base, lora.scale)
        self.run = Step(base, self.adapter, size, rows)
        super().__init__([self.adapter], lora, size.tokens)

    def _gradient(self, micros: Sequence[Micro], share: float) -> torch.Tensor:
        loss = torch.zeros((), dtype=self.adapter.dtype, device=self.base.device)
        for n, micro in enumerate(micros):
            loss += self.run.run(micro, share)
            self.run.collect(add=n > 0)
        return loss


class SpreadTrainer(Resident):
    """On several, a base each: their layers, one after the other."""

    grain, ends = FINE, ENDS

    def __init__(self, bases: Sequence[Base], lora: Lora, size: Size, rows: int) -> None:
        super().__init__([Adapter(base, lora.scale) for base in bases], lora, size.tokens)
        self.stages = Stages(bases, self.adapters, size, rows)

    def _gradient(self, micros: Sequence[Micro], share: float) -> torch.Tensor:
        return self.stages.run(micros, share)


def load_fast(folder: str, lora: Lora, dtype: str, step_rows: int, max_length: int, gpus: int = 1) -> Resident:
    """The base onto the first device, or the first ones. Micro-batches go by the kind of GPU and how many there are,
    not by what is free of them just then: bits depend on them."""
    config, devices, kind = load_config(folder), visible_devices()[: max(1, gpus)], getattr(torch, dtype)
    family = trained(config)
    assert family.shape
    shape, step_tokens = family.shape(config), step_rows * max_length
    devices = devices[: shape.layers]
    if devices[0].type != "cuda":
        tokens = round_up(max(max_length, min(step_tokens, CPU_TOKENS)))
        base = load_base(folder, dtype, lora.rank, max_length)
        return FastTrainer(base, lora, Size(tokens, tokens, False), step_rows)
    wide = 8 if kind == torch.float64 else 4
    room = min(torch.cuda.get_device_properties(device).total_memory for device in devices) - CONTEXT
    plan = plan_training(shape, lora.rank, kind.itemsize, step_tokens, max_length, room, wide, len(devices))
    announce("the training", plan, free_memory(devices))
    stages = load_stages(folder, dtype, lora.rank, max_length, devices, plan.embed_on_host)
    if len(stages) > 1:
        return SpreadTrainer(stages, lora, plan.size, step_rows)
    return FastTrainer(stages[0], lora, plan.size, step_rows)


def trains_fast(folder: str, lora: Lora) -> bool:
    """Whether this trainer knows the family, and all that the recipe asks for."""
    config = load_config(folder)
    family = family_of(config.model_type, "is not trained here; these are")
    if lora.dropout or lora.rank > MOST_RANK or not is_trained(family):
        return False
    assert family.shape
    return visible_devices()[0].type != "cuda" or family.shape(config).head in HEADS
