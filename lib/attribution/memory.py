"""What attribution holds on a GPU, by the shapes alone, and whether activations have to be computed again."""

from dataclasses import dataclass
from typing import Any

from lib.checkpoint.families import NO_RULES, LinearNames, family_of, last

GIB = 2**30
GRADIENT_VALUES = 1 << 28  # of a layer's weight gradients, made at once at weight level


@dataclass(frozen=True)
class Memory:
    """Of the fullest device, before anything is loaded."""

    weights: int
    kept: int  # activations that wait for the backward pass
    passing: int  # alive at the worst moment beside them
    totals: int  # weight level: the sums
    recompute: bool
    free: int

    @property
    def need(self) -> int:
        return self.weights + self.kept + self.passing + self.totals

    def __str__(self) -> str:
        parts = f"weights {self.weights / GIB:.2f} + activations {(self.kept + self.passing) / GIB:.2f}"
        parts += f" + sums {self.totals / GIB:.2f}" if self.totals else ""
        how = "activations computed again in the backward pass" if self.recompute else "all activations kept"
        return f"memory a GPU: {self.need / GIB:.2f} of {self.free / GIB:.1f} GiB ({parts} GiB; {how})"


def plan_memory(
    config: Any,
    weight_bytes: int,
    scored: dict[str, tuple[int, int]],
    *,
    level: str,
    scores: tuple[str, ...],
    batch: tuple[int, int],
    itemsize: int,
    devices: int,
    free: int,
    blocks: int = 1,
    recompute: bool | None = None,
) -> Memory:
    """`scored`: layer -> (outputs, inputs); `batch`: (samples, tokens). With `recompute` None it is chosen: only where
    keeping everything does not fit. With more `blocks` than one the sums of two are held: one is being written."""
    tokens = batch[0] * batch[1]
    layers, hidden = config.num_hidden_layers, config.hidden_size
    family = family_of(config.model_type, NO_RULES)
    inner = getattr(config, family.inner)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * width
    per_token = _kept(family.linears, scored, level, scores, hidden, inner, heads * width, kv)
    flying = 1 if devices == 1 else 2 * devices  # batches in flight
    mine = -(-layers // devices)
    layer = tokens * (per_token * itemsize + 8 + 4 * heads)  # norms' scales and attention's, in float32
    passing = tokens * (4 * inner + 4 * hidden) * itemsize  # gradients of a gated MLP, and what feeds it
    totals = 0
    if level == "weight":
        largest = max(j * i for j, i in scored.values())
        passing += itemsize * max(largest, min(batch[0] * largest, GRADIENT_VALUES))
        totals = 4 * len(scores) * min(blocks, 2) * sum(j * i for j, i in scored.values()) // devices
    else:
        passing += 4 * tokens // batch[1] * max((j * -(-i // 128) for j, i in scored.values()), default=0)
    keep = Memory(weight_bytes // devices, flying * mine * layer, passing, totals, False, free)
    if recompute is False or (recompute is None and keep.need <= free):
        return keep
    edges = flying * mine * tokens * hidden * itemsize
    return Memory(weight_bytes // devices, edges, passing + layer, totals, True, free)


def _kept(
    linears: LinearNames,
    scored: dict[str, tuple[int, int]],
    level: str,
    scores: tuple[str, ...],
    hidden: int,
    inner: int,
    attended: int,
    kv: int,
) -> int:
    """Values a token and layer that the backward pass waits for. What is saved twice is stored once."""
    names = {last(name) for name in scored}
    q, k, v, o, up, down = map(last, (linears.q, linears.k, linears.v, linears.o, linears.up, linears.down))
    count = 2 * attended + 2 * kv + (2 * inner if linears.gate else inner)
    count += hidden if names & {q, k, v} else 0
    count += hidden if names & {up, last(linears.gate or up)} else 0
    count += inner if down in names else 0
    if level == "neuron" and "signed" in scores:  # outputs, where nothing else keeps them
        count += (attended if q in names else 0) + (kv if k in names else 0)
        count += hidden * len(names & {o, down})
    return count
