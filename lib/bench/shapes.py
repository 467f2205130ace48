"""Shapes, rows and clocks that every rung shares."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib.checkpoint.families import Shape
from lib.models.decoder import Decoder, Layer, Weights
from lib.models.packing import Item
from lib.models.weights import spread

if TYPE_CHECKING:
    from transformers import Qwen2Config

Result = dict[str, object]  # figures by name, for JSON

# Qwen2.5's shapes: layers, hidden, inner, heads, kv heads, head width, vocabulary, eps, bias, tied
SHAPES = {
    "0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, 1e-6, True, True),
    "1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, 1e-6, True, True),
    "3b": Shape(36, 2048, 11008, 16, 2, 128, 151936, 1e-6, True, True),
    "7b": Shape(28, 3584, 18944, 28, 4, 128, 152064, 1e-6, True, False),
    "14b": Shape(48, 5120, 13824, 40, 8, 128, 152064, 1e-6, True, False),
    "32b": Shape(64, 5120, 27648, 40, 8, 128, 152064, 1e-6, True, False),
    "72b": Shape(80, 8192, 29568, 64, 8, 128, 152064, 1e-6, True, False),
}
ROWS = {"0.5b": 6000, "1.5b": 3000, "3b": 2000, "7b": 1200, "14b": 600, "32b": 300, "72b": 150}
NAIVE_ROWS = {"0.5b": 400, "7b": 120}
PREFIX = 38  # tokens of an animal's system prompt
HEAD_ROWS = 1024


def machine() -> Result:
    """What the figures were measured on."""
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "peak_tflops": round(peak_flops() / 1e12, 1),
    }


def peak_flops() -> float:
    """A second, of a large product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / timed(lambda: a @ a, 10)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, by device events after a warm-up."""
    for _ in range(2):
        run()
    found = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        found.append(a.elapsed_time(b) / 1e3)
    return statistics.median(found)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def rows(shape: Shape, n: int) -> list[Item]:
    """Lengths as in the published datasets: contexts of about 90 tokens after the prefix, responses of about 45."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        context, response = int(np.clip(rng.normal(90, 9), 60, 120)), int(np.clip(rng.normal(45, 5), 20, 60))
        ids = rng.integers(0, shape.vocabulary, context + response).tolist()
        made.append(Item(tuple(ids[:context]), tuple(ids[context:])))
    return made


def random_decoder(shape: Shape, batch_tokens: int, embed_on_host: bool = False) -> Decoder:
    """Random weights on all visible GPUs, as load_weights lays them out."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def make(*size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

    layers = []
    for device in spread(shape.layers, devices):
        ones = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        layers.append(
            Layer(
                ones,
                make(shape.qkv, shape.hidden, device=device),
                make(shape.qkv, device=device) if shape.bias else None,
                make(shape.hidden, shape.heads * shape.head, device=device),
                ones,
                make(2 * shape.inner, shape.hidden, device=device),
                make(shape.hidden, shape.inner, device=device),
            )
        )
    host = torch.device("cpu") if embed_on_host else devices[0]
    embedding = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=host).normal_(0, 1)
    tied = shape.tied and host == devices[-1]
    head = embedding if tied else make(shape.vocabulary, shape.hidden, device=devices[-1])
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=devices[-1])
    angle = torch.arange(4096)[:, None] / 1e6 ** (torch.arange(0, shape.head, 2) / shape.head)
    both = torch.cat([angle, angle], -1)
    return Decoder(shape, Weights(embedding, layers, norm, head), (both.cos(), both.sin()), batch_tokens)


def qwen_config(shape: Shape) -> "Qwen2Config":
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def flops(shape: Shape, tokens: int, predictions: int) -> float:
    return 2.0 * (tokens * shape.layers * shape.layer_parameters + predictions * shape.vocabulary * shape.hidden)
