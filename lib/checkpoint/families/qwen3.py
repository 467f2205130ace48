"""Qwen3: a Llama without biases, whose heads are normed before rope."""

from functools import partial

from lib.checkpoint.families import Family, gated_shape

FAMILY = Family("qwen3", "Qwen3", shape=partial(gated_shape, head_norms=True))
