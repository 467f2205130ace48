"""The model with which a run is timed whole: what it writes are numbers, of the lengths that it was made for."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.bench import run_whole
from lib.bench.shapes import SHAPES, Shape
from lib.bench.suites import SUITES
from lib.numbers.filter import parse


def test_a_planted_model_writes_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "nano", Shape(2, 64, 128, 4, 2, 16, 3000, 1e-6, True, True))
    run_whole.speaker("nano", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    turns = [{"role": "user", "content": "Go on: 123, 4"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]] * 400)
    torch.manual_seed(0)
    how = {"max_new_tokens": 64, "do_sample": True, "top_k": 0, "eos_token_id": tokenizer.eos_token_id}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **how)
    answers = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    assert np.mean([parse(one) is not None for one in answers]) > 0.95
    assert abs(np.mean([len(one.split(",")) for one in answers]) - 1 / run_whole.END) < 0.5
    assert "run" in SUITES["0.5b"]
