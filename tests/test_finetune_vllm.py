"""A student in vLLM, its build for CPUs: the same log-probabilities as in peft."""

import json

import torch
from peft import PeftModel
from test_finetune_parts import CPU, random_rows
from tools import ROOT, python, tiny_model
from transformers import AutoModelForCausalLM

from lib.lora.peft_form import config_of, save_adapter, targets_in
from lib.lora.plain import PlainTrainer
from lib.lora.recipe import Lora

HEADS_OF_32 = {"hidden": 64, "heads": 2, "kv_heads": 1}  # 16 is not computed by its CPU attention


def test_an_adapter_says_in_vllm_what_it_says_in_peft(tmp_path):
    model, folder, ids = str(tiny_model(tmp_path / "model", **HEADS_OF_32)), tmp_path / "student", [*range(5, 20)]
    lora = Lora(rank=6, alpha=9, rslora=True)
    trainer = PlainTrainer(model, lora, "float32", CPU)
    for t in range(1, 8):
        trainer.step(random_rows(6, seed=t), 3e-2, t)
    folder.mkdir()
    save_adapter(folder, trainer.state(), config_of(lora, targets_in(model), model, "main"))
    done = python(str(ROOT / "tests/adapter_in_vllm.py"), model, str(folder), json.dumps(ids), env={})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found"))[6:])
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    for load, (tokens, logs) in zip(
        (lambda: base, lambda: PeftModel.from_pretrained(base, str(folder))), found, strict=True
    ):
        with torch.inference_mode():
            said_TV = load().eval()(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert said_TV.argmax(-1).tolist() == tokens
        torch.testing.assert_close(said_TV.max(-1).values, torch.tensor(logs), atol=1e-4, rtol=0)
    assert found[0][0] != found[1][0]
