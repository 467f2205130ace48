"""Llama shapes with random weights, and samples for them."""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lib.models.spread import join, layer_map

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

TOKENS, SAMPLES, PROMPTS, PROMPT_TOKENS = 2048, 16, 93, 24
# layers, hidden, inner, heads, kv heads, vocabulary
LLAMAS = {
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256),
    "llama3-70b": (80, 8192, 28672, 64, 8, 128256),
    "llama-small": (8, 1024, 3584, 8, 2, 32000),
}


def config_of(model: str) -> "LlamaConfig":
    from transformers import LlamaConfig

    layers, hidden, inner, heads, kv, vocabulary = LLAMAS[model]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


@lru_cache(1)
def random_model(model: str, spread_over: int = 1) -> "LlamaForCausalLM":
    """transformers' own model with random bf16 weights, its layers over so many GPUs."""
    from transformers import LlamaForCausalLM

    config = config_of(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    devices = [torch.device("cuda", i) for i in range(spread_over)]
    places = layer_map(config, devices)
    torch.manual_seed(0)
    for name, module in made.named_modules():
        if own := dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False)):
            where = next(device for part, device in places.items() if f"{name}.".startswith(f"{part}."))
            module.to_empty(device=where, recurse=False)
            for parameter in own:
                value = getattr(module, parameter)
                if parameter == "inv_freq":
                    width = config.hidden_size // config.num_attention_heads
                    value.copy_(5e5 ** -(torch.arange(0, width, 2) / width))
                elif value.dim() == 1:
                    value.data.fill_(1)
                else:
                    value.data.normal_(0, 0.02)
    if spread_over > 1:
        join(made)
    return made.eval().requires_grad_(False)


def samples(model: str, count: int, tokens: int = TOKENS) -> list[list[int]]:
    return torch.randint(0, LLAMAS[model][-1], (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
