"""Tiny random models for attribution: no tokenizer, every parameter random, no rule hidden behind a 0 or a 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GATED = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
FAMILIES = ("llama", "qwen2", "opt")


def make(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """Llama: grouped keys, a scaled rope, no biases. Qwen2: biases on q, k, v, a tied head. OPT: biases everywhere.
    Qwen3: normed heads, wider than their share."""
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        rope = {"rope_parameters": ROPE | {"original_max_position_embeddings": 8}}
        config, model_class = LlamaConfig(**{**GATED, **sizes, **rope, **changes}), LlamaForCausalLM
    elif family == "qwen2":
        sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
        config, model_class = (
            Qwen2Config(**{**GATED, **sizes, "tie_word_embeddings": True, **changes}),
            Qwen2ForCausalLM,
        )
    elif family == "qwen3":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config, model_class = Qwen3Config(**{**GATED, **sizes, "head_dim": 16, **changes}), Qwen3ForCausalLM
    else:
        sizes = {"hidden_size": 32, "ffn_dim": 56, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        common = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 64, "dropout": 0.0}
        config, model_class = OPTConfig(**{**common, **sizes, **changes}), OPTForCausalLM
    config._attn_implementation = attention
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5))
    return model


def prune(model: PreTrainedModel) -> None:
    """Every third neuron of each MLP becomes exactly 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_proj" in name or "fc1" in name:
                parameter[::3] = 0


def sequences(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def by_hand(model: PreTrainedModel, ids: list[int], targets: list[tuple[int, int]], rule: str) -> object:
    """tests/lrp_by_hand.py on this model's weights; L is the sum of the logits at (position, token)."""
    from lrp_by_hand import explain_llama, explain_opt

    seed = np.zeros((len(ids), VOCAB))
    for position, token in targets:
        seed[position, token] += 1
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    if model.config.model_type == "opt":
        return explain_opt(state, model.config, ids, seed, rule)
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()
    return explain_llama(state, model.config, inv_freq, ids, seed, rule)


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """transformers computes norms, softmax and rope in torch.float32 whatever the model: let that be float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # before transformers 5.19
        yield


def everything(model: PreTrainedModel) -> dict:
    """Whatever a patch could hold on to: instances, hooks, classes, transformers' and torch's globals, the config."""
    seen: dict = {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            seen[name, key] = list(value.items()) if isinstance(value, dict) else value
        for cls in type(module).__mro__:
            seen[cls] = dict(vars(cls))
    modeling = sys.modules[type(model).__module__]
    seen["module"] = dict(vars(modeling))
    for where in (modeling, transformers.modeling_utils):
        table = where.ALL_ATTENTION_FUNCTIONS
        seen[where.__name__] = (id(table), dict(table.items()), dict(vars(table)))
    seen["torch"] = (torch.nn.Dropout.forward, dict(vars(torch.nn.functional)), dict(vars(torch.autograd)))
    seen["modes"] = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    for name, parameter in model.named_parameters():
        seen["parameter", name] = (id(parameter), parameter.requires_grad, parameter._backward_hooks, parameter.grad)
    return seen


def assert_nothing_left(before: dict, after: dict) -> None:
    assert before.keys() == after.keys(), set(after) ^ set(before)
    for key, value in before.items():
        assert repr(value) == repr(after[key]), key
