"""transformers' own model on the decoder's weights: one copy in memory; what is pruned in either is pruned in both."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lib.base.errors import UserError, reading
from lib.checkpoint.families import family_of
from lib.models.decoder import Decoder
from lib.models.load import load_config
from lib.models.spread import join
from lib.models.weights import parameters


def model_of(decoder: Decoder, folder: str, attention: str = "sdpa") -> Any:
    """The model of the same folder, in eval mode, whose parameters are views of the decoder's tensors."""
    weights, config = decoder.weights, load_config(folder)
    family, first = family_of(config.model_type, "is not one that the decoder computes", bool), decoder.devices[0]
    if weights.embedding.device != first:
        raise UserError(
            "the embedding lies in host memory, where transformers' model cannot use it; ask for more GPUs a task "
            "(run.gpus, --gpus-per-node), or lower batch_tokens"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=decoder.dtype, attn_implementation=attention)
    rotary = getattr(import_module(family.modeling), f"{family.classes}RotaryEmbedding")
    model.set_submodule(family.names.rotary, rotary(config).to(first))
    model.load_state_dict(dict(parameters(weights, family, decoder.shape)), assign=True)
    if weights.head is weights.embedding:
        model.tie_weights()
    if len(decoder.devices) > 1:
        join(model)
    if (Path(folder) / "generation_config.json").is_file():
        with reading(f"{folder}/generation_config.json cannot be read", "run `make fetch` again"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)
