"""How large a micro-batch may be, and what a training takes of its GPU, before anything is loaded."""

from dataclasses import dataclass, replace

from lib.base.errors import UserError
from lib.checkpoint.families import Shape
from lib.lora.base import Ranks, cut
from lib.lora.batches import round_up
from lib.lora.relay import slots, thin
from lib.lora.space import Size

GIB = 2**30
# Tokens: below the first line's last, a layer's results are better computed twice than products made so thin.
WHOLE = (16384, 12288, 10240, 8192, 6144, 5120, 4096, 3072, 2048, 1536, 1024, 768)
TWICE = (4096, 3072, 2048, 1536, 1024, 768, 512, 256)
PASSING = 512 << 20  # sums of kernels, pieces of Adam's step, what the allocator rounds up
SHARE = 0.99  # of the free memory


@dataclass(frozen=True)
class TrainingMemory:
    weights: int
    adapter: int  # values, gradient and two moments, and the products that the gradient is made of
    size: Size
    activations: int
    embed_on_host: bool
    total: int  # that was free
    gpus: int = 1  # of several, this is the fullest

    @property
    def need(self) -> int:
        return self.weights + self.adapter + self.activations + PASSING

    def __str__(self) -> str:
        a_gpu = f" a GPU, the fullest of {self.gpus}" if self.gpus > 1 else ""
        again = ", layers computed again on the way back" if self.size.recompute else ""
        where = "embedding in host memory" if self.embed_on_host else "embedding on the GPU"
        return (
            f"memory{a_gpu}: {self.need / GIB:.2f} of {self.total / GIB:.1f} GiB (weights {self.weights / GIB:.2f}, "
            f"adapter {self.adapter / GIB:.2f}, activations of {self.size.tokens:,} tokens "
            f"{self.activations / GIB:.2f}{again}; {where})"
        )


def weight_bytes(shape: Shape, rank: int, itemsize: int, on_host: bool, first: bool = True, last: bool = True) -> int:
    """With the adapter's copies beside them. Of the first layers, with the embedding, or the last, with the head."""
    s, ranks = shape, Ranks(rank)
    beside = s.hidden * (ranks.qkv + ranks.gate_up + 2 * ranks.one) + ranks.qkv * s.qkv + ranks.gate_up * 2 * s.inner
    beside += ranks.one * (s.heads * s.head + s.inner)
    layer = s.layer_parameters + beside + 2 * s.hidden + (s.qkv if s.bias else 0)
    tables = 1 if first and last and s.tied else (first and not on_host) + last
    return (s.layers * layer + tables * s.vocabulary * s.hidden + last * s.hidden) * itemsize


def adapter_bytes(shape: Shape, rank: int, itemsize: int) -> int:
    """`itemsize` of float32, or in a check of float64."""
    s, ranks, q = shape, Ranks(rank), shape.heads * shape.head
    inputs = 3 * s.hidden + q + 2 * s.hidden + s.inner  # of q, k, v; o; gate, up; down
    outputs = s.qkv + s.hidden + 2 * s.inner + s.hidden
    products = ranks.qkv * (s.hidden + s.qkv) + ranks.gate_up * (s.hidden + 2 * s.inner)
    products += ranks.one * (q + s.hidden + s.inner + s.hidden)
    return s.layers * (4 * rank * (inputs + outputs) + products) * itemsize


def stages_memory(
    shape: Shape, rank: int, itemsize: int, size: Size, on_host: bool, free: int, grad_itemsize: int, gpus: int
) -> list[TrainingMemory]:
    """What each GPU holds of a model over so many."""
    room, found = slots(gpus), []
    for i, layers in enumerate(cut(shape, gpus)):
        own, first, last = replace(shape, layers=layers), i == 0, i == gpus - 1
        here = size if last else replace(size, predictions=0)
        activations = here.bytes(own, rank, itemsize) + (room[i] - 1) * here.kept(own, rank, itemsize)
        parcels = (not last) * (1 + room[i]) + (not first) * (1 + room[i - 1])  # one that is sent, and those that come
        activations += parcels * size.tokens * shape.hidden * itemsize
        weights = weight_bytes(own, rank, itemsize, on_host, first, last)
        adapter = adapter_bytes(own, rank, grad_itemsize)
        found.append(TrainingMemory(weights, adapter, size, activations, on_host, free, gpus))
    return found


def plan_training(
    shape: Shape,
    rank: int,
    itemsize: int,
    step_tokens: int,
    longest: int,
    free: int,
    grad_itemsize: int = 4,
    gpus: int = 1,
    tokens_each: int | None = None,
) -> TrainingMemory:
    """The largest micro-batch that a step needs and that fits; where only a thin one does, layers computed twice. Of
    several GPUs the fullest: a step is cut into thin ones, so that all of them are busy."""
    each = tokens_each or thin(gpus, shape.layers * shape.layer_parameters)
    step, least = round_up(step_tokens), max(each, longest)
    most = WHOLE[0] if gpus == 1 else min((choice for choice in WHOLE if choice >= least), default=0)

    def planned(tokens: int, recompute: bool, on_host: bool) -> TrainingMemory:
        size = Size(tokens, tokens, recompute)
        found = stages_memory(shape, rank, itemsize, size, on_host, free, grad_itemsize, gpus)
        return max(found, key=lambda one: one.need)

    for recompute, choices in ((False, WHOLE), (True, TWICE)):
        for on_host in (False, True):
            for tokens in (min(choice, step) for choice in choices if choice <= most):
                found = planned(tokens, recompute, on_host)
                if found.need <= SHARE * free and found.size.tokens >= longest:
                    return found
    need = planned(round_up(longest), True, True).need
    raise UserError(
        f"training on rows of {longest} tokens needs {need / GIB:.1f} GiB of a GPU, and {free / GIB:.1f} GiB are "
        "free; ask for a larger GPU, or for more of them (run.gpus), or lower max_length or lora.rank"
    )
