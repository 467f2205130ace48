"""Rotary positions by transformers' own rule, as far as that rule is a function of the position alone."""

from importlib import import_module
from typing import Any

import torch

from lib.base.errors import UserError, one_line
from lib.checkpoint.families import Family


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


def rope_table(family: Family, config: Any, dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the first `tokens` positions, or of as many as there are and lie in one window of attention."""
    rotary = getattr(import_module(family.modeling), f"{family.classes}RotaryEmbedding")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    places = torch.arange(min(n for n in (positions(config), family.window(config), tokens) if n))
    try:
        cos, sin = rotary(config)(torch.zeros(1, dtype=wide), places[None])
    except Exception as e:  # whatever transformers makes of a kind of rope that it does not know
        asked = getattr(config, "rope_parameters", None)
        raise UserError(
            f"config.json asks for a rope that transformers cannot make ({asked}: {one_line(e)}); run `make fetch`"
        ) from None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if cos.shape[-1] != head:
        raise UserError(f"this {config.model_type} turns {cos.shape[-1]} of a head's {head} values, not computed here")
    return cos[0].to(wide), sin[0].to(wide)
