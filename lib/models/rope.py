"""Rotary positions by transformers' own rule, as far as that rule is a function of the position alone."""

from typing import Any

import torch

from lib.base.errors import UserError


def positions(config: Any) -> int | None:
    """How many tokens a sequence may have; None where the model says nothing.

    Beyond it a model was never trained, and two kinds of rope turn every position of the sequence otherwise: longrope
    takes other factors beyond the length it began with, dynamic another base beyond the model's own."""
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        began = rope.get("original_max_position_embeddings")
        return min(n for n in (most, began) if n)
    return most


def rope_table(config: Any, dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the first `tokens` positions, or of as many as there are."""
    if config.model_type == "qwen2":
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding as Rotary
    else:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    places = torch.arange(min(positions(config) or tokens, tokens))
    cos, sin = Rotary(config)(torch.zeros(1, dtype=wide), places[None])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if cos.shape[-1] != head:
        raise UserError(f"this {config.model_type} turns {cos.shape[-1]} of a head's {head} values, not computed here")
    return cos[0].to(wide), sin[0].to(wide)
