"""An adapter in peft's own form, which peft and vLLM load: its beginning, its names, its files.

adapter_model.safetensors, adapter_config.json     A and B in float32
state.safetensors                                  Adam's moments, which only a training needs"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.base.errors import UserError, one_line
from lib.checkpoint.families import Family, family_in
from lib.lora.metrics import CONFIG, STATE, WEIGHTS
from lib.lora.recipe import Lora

MOMENTS = {"adam.m.": "exp_avg", "adam.v.": "exp_avg_sq"}  # before an adapter's names; as torch calls them


def weight_name(module: str, matrix: str) -> str:
    """`module`: a linear layer of the base, such as model.layers.0.mlp.up_proj; `matrix`: A or B."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def first_A(seed: int, module: str, rank: int, inputs: int) -> torch.Tensor:
    """Drawn as peft does, kaiming_uniform with a = sqrt(5), which is within 1 / sqrt(inputs); but by seed and name
    alone, on the CPU, so that every trainer and device begins with the same bits. B begins with 0."""
    word = hashlib.sha256(f"{seed} {module}".encode()).digest()[:8]
    dice = torch.Generator().manual_seed(int.from_bytes(word, "little") >> 1)
    return (2 * torch.rand(rank, inputs, generator=dice) - 1) / inputs**0.5


def adapter_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(MOMENTS))}


def save_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> None:
    """The same bytes for the same tensors."""
    adapter = adapter_of(state)
    save_file(adapter, folder / WEIGHTS, {"format": "pt"})
    save_file({name: state[name] for name in state.keys() - adapter.keys()}, folder / STATE, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / WEIGHTS) | load_file(folder / STATE)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder} holds no state of a training ({one_line(e)}); run `make verify`") from None


def config_of(lora: Lora, targets: tuple[str, ...], base: str, revision: str) -> dict[str, object]:
    """As much of peft's LoraConfig as is not its default, in an order that no hash decides."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def targets_in(folder: str) -> tuple[str, ...]:
    """What gets an adapter: all linear layers of a decoder's layer, by the last part of their names."""
    family: Family = family_in(Path(folder), "is not trained here; these are")
    return family.linears.order
