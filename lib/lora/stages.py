"""One model over several devices: each has some of the layers and that part of the adapter, and micro-batches follow
each other through them. One thread launches everything and waits for nothing; what a stage waits for are events.

Suffixes as in base."""

from collections.abc import Sequence

import torch

from lib.lora.adapter import Adapter
from lib.lora.base import Base
from lib.lora.batches import Micro
from lib.lora.relay import Turn, slots, turns
from lib.lora.space import Size
from lib.lora.step import Step
from lib.models.decoder import on


class Link:
    """From one device to another, by streams of its own: torch's copy makes the current streams of both wait for each
    other, and with those that compute the stages would work in turns. `room`: of so many parcels."""

    def __init__(self, source: Base, target: Base, tokens: int, room: int) -> None:
        size, kind, self.source, self.target = (tokens, source.shape.hidden), source.dtype, source.device, target.device
        self.sent_MD = torch.empty(size, dtype=kind, device=self.source)
        self.came = [torch.empty(size, dtype=kind, device=self.target) for _ in range(room)]
        self.real = self.source.type == "cuda"
        if self.real:
            self.out, self.back = torch.cuda.Stream(self.source), torch.cuda.Stream(self.target)
            self.packed, self.copied = torch.cuda.Event(), torch.cuda.Event()
            self.arrived = [torch.cuda.Event() for _ in range(room)]
            torch.cuda.synchronize(self.target)  # whatever lay in its memory before

    def send(self, x_MD: torch.Tensor, slot: int) -> None:
        """After what the source was given to compute. What came in this slot before is taken by then: a micro-batch
        gets its slot when the one before it has been through it both ways."""
        there, here = self.came[slot][: len(x_MD)], self.sent_MD[: len(x_MD)]
        if not self.real:
            there.copy_(here.copy_(x_MD))
            return
        with on(self.source):
            now = torch.cuda.current_stream()
            now.wait_event(self.copied)  # what was sent before
            here.copy_(x_MD)
            self.packed.record(now)
        self.out.wait_event(self.packed)
        with torch.cuda.stream(self.back), torch.cuda.stream(self.out):
            there.copy_(here, non_blocking=True)
        self.copied.record(self.out)
        self.arrived[slot].record(self.back)

    def take(self, x_MD: torch.Tensor, slot: int) -> None:
        """Before what the target is given to compute next."""
        came = self.came[slot][: len(x_MD)]
        with on(self.target):
            if self.real:
                torch.cuda.current_stream().wait_event(self.arrived[slot])
            x_MD.copy_(came)


class Stages:
    """`size`: of the largest micro-batch."""

    def __init__(self, bases: Sequence[Base], adapters: Sequence[Adapter], size: Size, rows: int) -> None:
        self.room, last = slots(len(bases)), len(bases) - 1
        self.steps = [
            Step(base, adapter, Size(size.tokens, size.predictions if i == last else 0, size.recompute), rows, room)
            for i, (base, adapter, room) in enumerate(zip(bases, adapters, self.room, strict=True))
        ]
        pairs = [(bases[i], bases[i + 1], self.room[i]) for i in range(last)]
        self.onwards = [Link(a, b, size.tokens, room) for a, b, room in pairs]
        self.back = [Link(b, a, size.tokens, room) for a, b, room in pairs]

    @torch.no_grad()
    def run(self, micros: Sequence[Micro], share: float) -> torch.Tensor:
        """The gradient of all of them into the adapters; the loss, on the last device."""
        last = self.steps[-1]
        loss = torch.zeros((), dtype=last.adapter.dtype, device=last.base.device)
        for turn in turns(len(self.steps), len(micros)):
            self._take(turn, micros[turn.micro], share)
            if turn.way == "both":
                loss += last.loss(micros[turn.micro])
        return loss

    def _take(self, turn: Turn, micro: Micro, share: float) -> None:
        """What comes from one neighbour, a way through the layers, and what goes to the other."""
        i, step = turn.stage, self.steps[turn.stage]
        slot, tokens, hidden = turn.micro % self.room[i], micro.size[0], step.base.shape.hidden
        space = step.spaces[slot]
        if turn.way != "backward":
            with on(step.base.device):
                step.put(micro, share, slot)
            if i:
                self.onwards[i - 1].take(space.x_LMD[0, :tokens], turn.micro % self.room[i - 1])
        else:
            self.back[i].take(space.g_MD[:tokens, :hidden], slot)
        step.turn(turn.way, micro, slot)
        if turn.way == "forward":
            self.onwards[i].send(space.x_LMD[-1, :tokens], slot)
            return
        if i:
            self.back[i - 1].send(space.g_MD[:tokens, :hidden], turn.micro % self.room[i - 1])
        step.collect(add=turn.micro > 0)
