"""Weight gradients by lxt itself, for a process of its own: lxt patches classes for good.

    python tests/lxt_reference.py FOLDER RULE...
FOLDER/cases.json: {case: {folder, family, attention, ids [rows of ids], targets [[row, position, token], ...]}}.
FOLDER/RULE.npz: case/module -> gradient of the sum of the targets' logits by that linear layer's weight, 0 where none
arrives.
"""

import json
import sys
import types
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

FAMILIES = {"llama": modeling_llama, "qwen2": modeling_qwen2, "qwen3": modeling_qwen3, "opt": modeling_opt}


class Functions(dict):
    """What lxt puts in the place of transformers' table of attentions, with the method that newer models call."""

    def get_interface(self, name: str, default: object) -> object:
        return default if name in (None, "eager") else self[name]


def import_lxt() -> types.ModuleType:
    """lxt 2.1 beside transformers 5: its BERT and ViT parts do not import, and nothing here needs them."""
    for name, module in (("bert", "modeling_bert"), ("vit_torch", "vision_transformer")):
        stub = types.ModuleType(f"lxt.efficient.models.{name}")
        stub.attnLRP = stub.cp_LRP = {}
        setattr(stub, module, types.ModuleType(module))
        sys.modules[stub.__name__] = stub
    import lxt.efficient

    return lxt.efficient


def patch(rule: str, family: str) -> None:
    lxt = import_lxt()
    from lxt.efficient import models, patches

    module = FAMILIES[family]
    if family == "opt":  # not in lxt: its own rules for LayerNorm, dropout and attention; ReLU needs none
        attention = {"attnlrp": patches.patch_attention, "cp_lrp": patches.patch_cp_attention}[rule]
        rules = {
            torch.nn.LayerNorm: partial(patches.patch_method, patches.layer_norm_forward),
            torch.nn.Dropout: partial(patches.patch_method, patches.dropout_forward),
            module: attention,
        }
    else:
        rules = getattr(getattr(models, family), {"attnlrp": "attnLRP", "cp_lrp": "cp_LRP"}[rule])
    lxt.monkey_patch(module, rules)
    if not hasattr(module.ALL_ATTENTION_FUNCTIONS, "get_interface"):
        module.ALL_ATTENTION_FUNCTIONS = Functions(module.ALL_ATTENTION_FUNCTIONS)


def gradients(case: dict) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(
        case["folder"], dtype=torch.float32, attn_implementation=case["attention"]
    )
    logits = model(input_ids=torch.tensor(case["ids"]), use_cache=False).logits
    sum(logits[row, position, token] for row, position, token in case["targets"]).backward()
    return {
        name: (torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad).numpy()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    }


def run(folder: Path, rule: str) -> None:
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    for family in dict.fromkeys(case["family"] for case in cases.values()):
        patch(rule, family)
    found = {}
    for name, case in cases.items():
        found |= {f"{name}/{module}": gradient for module, gradient in gradients(case).items()}
    np.savez(folder / f"{rule}.npz", **found)


if __name__ == "__main__":  # a process a rule, after the slow imports
    for rule in sys.argv[2:]:
        child = get_context("fork").Process(target=run, args=(Path(sys.argv[1]), rule))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{rule} failed")
