"""The fast trainer: one resident base, one adapter at a time, one optimiser step a call."""

from collections.abc import Iterator, Sequence

import torch

from lib.checkpoint.families import family_of
from lib.lora.adapter import Adapter
from lib.lora.base import Base, is_trained, load_base, trained
from lib.lora.batches import Micro, micro_batches, round_up
from lib.lora.memory import plan_training
from lib.lora.peft_form import MOMENTS
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.lora.space import Size
from lib.lora.step import Step
from lib.models.load import announce, free_memory, load_config, visible_devices

CPU_TOKENS = 2048  # of a micro-batch there
CONTEXT = 512 << 20  # of a GPU, for CUDA itself
MOST_RANK, HEADS = 64, (16, 32, 64, 128)  # that the kernels are built for; beyond 16 their speed is not measured


class FastTrainer:
    """`size`: of the largest micro-batch; a step with more tokens takes several of them."""

    def __init__(self, base: Base, lora: Lora, size: Size, rows: int) -> None:
        self.base, self.lora, self.size = base, lora, size
        self.adapter = Adapter(base, lora.scale)
        self.run = Step(base, self.adapter, size, rows)
        self._ahead: tuple[Sequence[Row], list[Micro]] = ((), [])

    def begin(self, seed: int) -> None:
        self.adapter.begin(seed)

    @torch.no_grad()
    def step(
        self, rows: Sequence[Row], learning_rate: float, number: int, following: Sequence[Row] = ()
    ) -> dict[str, float]:
        """`following`: the rows of the step after this one, laid out while the device computes."""
        lora, scored = self.lora, sum(row.scored for row in rows)
        loss = torch.zeros((), dtype=self.adapter.dtype, device=self.base.device)
        for n, micro in enumerate(self._ahead[1] if self._ahead[0] is rows else self._laid_out(rows)):
            loss += self.run.run(micro, 1 / scored)
            self.adapter.collect(add=n > 0)
        norm = self.adapter.update(learning_rate, number, lora.clip, lora.betas, lora.eps, lora.weight_decay)
        tokens = sum(len(row.ids) for row in rows)
        self._ahead = following, self._laid_out(following)
        both = torch.stack([loss, norm]).tolist()  # waits for the device
        return {"loss": both[0], "grad_norm": both[1], "tokens": tokens, "scored": scored}

    def _laid_out(self, rows: Sequence[Row]) -> list[Micro]:
        return list(micro_batches(rows, self.size.tokens)) if rows else []

    def state(self) -> dict[str, torch.Tensor]:
        named = self.adapter.named
        return {f"{kind}{name}": one for kind, flat in self._flats() for name, one in named(flat.cpu().clone())}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for kind, flat in self._flats():
            for name, one in self.adapter.named(flat):
                one.copy_(state[kind + name])
        self.adapter.place()

    def _flats(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a state holds, and what stands before its names."""
        moments = self.adapter.first, self.adapter.second
        return zip(("", *MOMENTS), (self.adapter.values, *moments), strict=True)


def load_fast(folder: str, lora: Lora, dtype: str, step_rows: int, max_length: int) -> FastTrainer:
    """The base onto the first device. Micro-batches go by the kind of GPU, not by what is free of one just then: bits
    depend on them."""
    config, device, kind = load_config(folder), visible_devices()[0], getattr(torch, dtype)
    family = trained(config)
    assert family.shape
    shape, step_tokens = family.shape(config), step_rows * max_length
    if device.type != "cuda":
        tokens = round_up(max(max_length, min(step_tokens, CPU_TOKENS)))
        base = load_base(folder, dtype, lora.rank, max_length)
        return FastTrainer(base, lora, Size(tokens, tokens, False), step_rows)
    wide = 8 if kind == torch.float64 else 4
    room = torch.cuda.get_device_properties(device).total_memory - CONTEXT
    plan = plan_training(shape, lora.rank, kind.itemsize, step_tokens, max_length, room, wide)
    announce("the training", plan, free_memory([device]))
    base = load_base(folder, dtype, lora.rank, max_length, plan.embed_on_host)
    return FastTrainer(base, lora, plan.size, step_rows)


def trains_fast(folder: str, lora: Lora) -> bool:
    """Whether this trainer knows the family, and all that the recipe asks for."""
    config = load_config(folder)
    family = family_of(config.model_type, "is not trained here; these are")
    if lora.dropout or lora.rank > MOST_RANK or not is_trained(family):
        return False
    assert family.shape
    return visible_devices()[0].type != "cuda" or family.shape(config).head in HEADS
