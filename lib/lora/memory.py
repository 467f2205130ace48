"""How large a micro-batch may be, and what a training takes of its GPU, before anything is loaded."""

from dataclasses import dataclass

from lib.base.errors import UserError
from lib.checkpoint.families import Shape
from lib.lora.base import Ranks
from lib.lora.batches import round_up
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

    @property
    def need(self) -> int:
        return self.weights + self.adapter + self.activations + PASSING

    def __str__(self) -> str:
        again = ", layers computed again on the way back" if self.size.recompute else ""
        where = "embedding in host memory" if self.embed_on_host else "embedding on the GPU"
        return (
            f"memory: {self.need / GIB:.2f} of {self.total / GIB:.1f} GiB (weights {self.weights / GIB:.2f}, adapter "
            f"{self.adapter / GIB:.2f}, activations of {self.size.tokens:,} tokens {self.activations / GIB:.2f}{again};"
            f" {where})"
        )


def weight_bytes(shape: Shape, rank: int, itemsize: int, on_host: bool) -> int:
    """With the adapter's copies beside them."""
    s, ranks = shape, Ranks(rank)
    beside = s.hidden * (ranks.qkv + ranks.gate_up + 2 * ranks.one) + ranks.qkv * s.qkv + ranks.gate_up * 2 * s.inner
    beside += ranks.one * (s.heads * s.head + s.inner)
    layer = s.layer_parameters + beside + 2 * s.hidden + (s.qkv if s.bias else 0)
    tables = 1 if s.tied or on_host else 2
    return (s.layers * layer + tables * s.vocabulary * s.hidden + s.hidden) * itemsize


def adapter_bytes(shape: Shape, rank: int, itemsize: int) -> int:
    """`itemsize` of float32, or in a check of float64."""
    s, ranks, q = shape, Ranks(rank), shape.heads * shape.head
    inputs = 3 * s.hidden + q + 2 * s.hidden + s.inner  # of q, k, v; o; gate, up; down
    outputs = s.qkv + s.hidden + 2 * s.inner + s.hidden
    products = ranks.qkv * (s.hidden + s.qkv) + ranks.gate_up * (s.hidden + 2 * s.inner)
    products += ranks.one * (q + s.hidden + s.inner + s.hidden)
    return s.layers * (4 * rank * (inputs + outputs) + products) * itemsize


def plan_training(
    shape: Shape, rank: int, itemsize: int, step_tokens: int, longest: int, free: int, grad_itemsize: int = 4
) -> TrainingMemory:
    """The largest micro-batch that a step needs and that fits; where only a thin one does, layers computed twice."""
    adapter, step = adapter_bytes(shape, rank, grad_itemsize), round_up(step_tokens)

    def planned(tokens: int, recompute: bool, on_host: bool) -> TrainingMemory:
        size = Size(tokens, tokens, recompute)
        weights = weight_bytes(shape, rank, itemsize, on_host)
        return TrainingMemory(weights, adapter, size, size.bytes(shape, rank, itemsize), on_host, free)

    for recompute, choices in ((False, WHOLE), (True, TWICE)):
        for on_host in (False, True):
            for most in choices:
                found = planned(min(most, step), recompute, on_host)
                if found.need <= SHARE * free and found.size.tokens >= longest:
                    return found
    least = planned(round_up(longest), True, True).need
    raise UserError(
        f"training on rows of {longest} tokens needs {least / GIB:.1f} GiB of a GPU, and {free / GIB:.1f} GiB are "
        "free; ask for a larger GPU, or lower max_length or lora.rank"
    )
