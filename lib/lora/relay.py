"""How micro-batches follow each other through the stages of a model: one forward, one backward, in turn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Tokens of the micro-batches under way at once: on two GPUs 2,048 each are best at 7B and 14B, measured. A wide model
# is content with fewer, whatever the stages: 72B over two H200s trains 3,669 tokens/s by 1,024, and 3,389 by 2,048.
STEP, WIDE, WIDE_TOKENS = 4096, 4e10, 1024
# A stage waits until the first micro-batch comes, and after its last one: these are smaller than the others. By how
# much: what a stage has to do meanwhile is a third (forward) or two thirds (backward) of what its neighbour does.
Ends = tuple[tuple[float, ...], tuple[float, ...]]  # sizes of the first ones, and of the last
ENDS: Ends = ((0.4,), (0.7, 0.5))
EVEN: Ends = ((), ())
Way = Literal["forward", "backward", "both"]  # the last stage goes back at once


@dataclass(frozen=True)
class Turn:
    stage: int
    way: Way
    micro: int


def thin(stages: int, parameters: int) -> int:
    """Tokens of a micro-batch, where a step has no longer rows."""
    return WIDE_TOKENS if parameters > WIDE else max(512, STEP // stages)


def slots(stages: int) -> list[int]:
    """Micro-batches that each stage keeps at once. One more than those under way behind it: with no more than these, a
    stage would wait for what the next one sends while it is sent."""
    return [stages - stage + 1 for stage in range(stages - 1)] + [1]


def times(stages: int, micros: int) -> float:
    """One device's rate, at most: each waits for the first micro-batch to come, and after its last one."""
    return stages * micros / (micros + stages - 1)


def turns(stages: int, micros: int) -> Iterator[Turn]:
    """In an order in which one thread can launch them all: each after those whose results it takes. A stage goes
    forward as long as it has room, and backward in the micro-batches' order, whatever takes how long."""
    room, forward, backward, last = slots(stages), [0] * stages, [0] * stages, stages - 1
    while backward[0] < micros:
        for stage in range(stages):
            there = micros if stage == 0 else forward[stage - 1]
            onwards = forward[stage] < micros and forward[stage] - backward[stage] < room[stage]
            if stage == last:
                if backward[stage] < there:
                    yield Turn(stage, "both", backward[stage])
                    forward[stage] = backward[stage] = backward[stage] + 1
            elif onwards and forward[stage] < there:
                yield Turn(stage, "forward", forward[stage])
                forward[stage] += 1
            elif not onwards and backward[stage] < backward[stage + 1]:
                yield Turn(stage, "backward", backward[stage])
                backward[stage] += 1
