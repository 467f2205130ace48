"""Llama 2 and 3: grouped keys, no biases, often a scaled rope."""

from lib.checkpoint.families import Family, gated_shape

FAMILY = Family("llama", "Llama", shape=gated_shape, fused_attention=True)
