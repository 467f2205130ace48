"""Qwen2 and 2.5: a Llama with biases on q, k, v; the smaller ones have one matrix for embedding and head."""

from functools import partial

from lib.checkpoint.families import Family, gated_shape

FAMILY = Family("qwen2", "Qwen2", shape=partial(gated_shape, bias=True), fused_attention=True)
