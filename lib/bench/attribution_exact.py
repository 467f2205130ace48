"""Attribution on a GPU against the same model in float64 on the CPU: small, every family, attention and type."""

from typing import TypedDict

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.attribution.attribute import Attributor, Scores
from lib.bench.shapes import Result

COMMON = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**COMMON, "intermediate_size": 700, "num_key_value_heads": 2}


class Options(TypedDict, total=False):
    """What an Attributor is made with."""

    layers: str
    level: str
    scores: tuple[str, ...]
    target: str
    wanda: bool
    batch: int


MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig, str, torch.dtype]] = {
    "llama_bf16": (LlamaForCausalLM, LlamaConfig(**GATED), "sdpa", torch.bfloat16),
    "llama_bf16_eager": (LlamaForCausalLM, LlamaConfig(**GATED), "eager", torch.bfloat16),
    "llama_fp16": (LlamaForCausalLM, LlamaConfig(**GATED), "sdpa", torch.float16),
    "qwen2_fp32": (Qwen2ForCausalLM, Qwen2Config(**GATED), "sdpa", torch.float32),
    "opt_bf16": (OPTForCausalLM, OPTConfig(**COMMON, ffn_dim=1024, word_embed_proj_dim=256), "sdpa", torch.bfloat16),
}
MODES: dict[str, Options] = {"neuron": {}, "all_positions": {"target": "all"}, "weight": {"level": "weight"}}


def exact(model: str, batch_tokens: int) -> Result:
    """Correlation of signed and abs scores with float64's, and whether a second run and recomputing change a bit."""
    torch.manual_seed(0)
    samples = [torch.randint(0, 500, (n,)).tolist() for n in (17, 40, 64, 300)]
    found: Result = {}
    for name, (family, config, attention, dtype) in MODELS.items():
        small = family._from_config(config, attn_implementation=attention).eval()
        for parameter in small.parameters():
            parameter.data = (parameter.data * (3 if parameter.dim() > 1 else 1)).to(dtype)
        truth = family._from_config(config, attn_implementation=attention).eval().double()
        truth.load_state_dict(small.state_dict())
        small.cuda()
        for mode, options in MODES.items():
            how: Options = {"layers": "all", "batch": 2, **options}
            wanted = Attributor(truth, **how).run(samples)
            got, again, anew = (
                Attributor(small, **how, recompute=recompute).run(samples, wanted.target)
                for recompute in (False, False, True)
            )
            found[f"{name}_{mode}"] = {
                "signed": _correlation(wanted.signed, got.signed),
                "abs": _correlation(wanted.abs, got.abs),
                "same_bits_again": _same(got, again),
                "same_bits_recomputed": _same(got, anew),
            }
    return found


def _correlation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([values.double().flatten().cpu() for values in part.values()]) for part in (a, b)]
    return round(float(torch.corrcoef(torch.stack(flat))[0, 1]), 5)


def _same(a: Scores, b: Scores) -> bool:
    return all(torch.equal(x[n], y[n]) for x, y in ((a.signed, b.signed), (a.abs, b.abs)) for n in a.layers)
