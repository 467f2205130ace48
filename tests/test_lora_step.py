"""The fast trainer against peft, autograd and torch's AdamW, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lib.lora.base import load_base
from lib.lora.batches import micro_batches
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.lora.space import Size
from lib.lora.trainer import FastTrainer
from tests.tools import tiny_llama, tiny_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 3, 5.0


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def folder(request, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp(request.param)
    return tiny_model(where) if request.param == "qwen2" else tiny_llama(where)


def ragged_rows(n: int, seed: int, longest: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, n)
    return [Row(tuple(rng.integers(0, 90, k).tolist()), int(rng.integers(1, k))) for k in lengths]


def trainer(folder: Path, size: Size, dtype: str = "float64", **more: object) -> FastTrainer:
    lora = Lora(rank=RANK, alpha=ALPHA, **more)
    made = FastTrainer(load_base(str(folder), dtype, RANK, 64), lora, size, 16)
    made.begin(1)
    return made


def with_random_b(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3
        if "lora_B" in name and "adam" not in name
        else value
        for name, value in state.items()
    }


def peft_model(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    how = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, bias="none")
    model = get_peft_model(plain, how, autocast_adapter_dtype=False).to(dtype)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            if not name.startswith("adam"):
                named[name.replace(".weight", ".default.weight")].copy_(value)
    return model


def loss_of(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Row by row, without padding or packing."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        logs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        total = total - sum(logs[t - 1, row.ids[t]] for t in range(row.first, len(row.ids)))
    return total / sum(row.scored for row in rows)


def gradients(made: FastTrainer, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Of one step that changes nothing."""
    made.step(rows, 0.0, 1)
    return {name: value.clone() for name, value in made.adapter.named(made.adapter.gradient)}


@pytest.mark.parametrize("size", [Size(1024, 1024, False), Size(256, 256, False), Size(256, 256, True)], ids=str)
def test_packed_rows_have_the_loss_and_gradient_of_each_alone(folder, size):
    """Packed in one batch, in several micro-batches, and computed again on the way back: as peft and autograd."""
    made, rows = trainer(folder, size, clip=1e9), ragged_rows(24, 0)
    made.load(with_random_b(made.state()))
    model = peft_model(folder, made.state(), torch.float64)
    loss = loss_of(model, rows)
    loss.backward()
    found = made.step(rows, 0.0, 1)
    assert len(list(micro_batches(rows, size.tokens))) == (1 if size.tokens == 1024 else 3)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-7)  # transformers norms in float32
    named = dict(model.named_parameters())
    for name, value in made.adapter.named(made.adapter.gradient):
        wanted = named[name.replace(".weight", ".default.weight")].grad
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_are_those_of_adamw_with_the_gradient_clipped(folder):
    made = trainer(folder, Size(512, 512, False), clip=0.5, weight_decay=0.1)
    model = peft_model(folder, made.state(), torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.1)
    for number in range(1, 6):
        rows, rate = ragged_rows(10, number), 0.01 * number
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimiser.step()
        found = made.step(rows, rate, number)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    named = dict(model.named_parameters())
    for name, value in made.adapter.named(made.adapter.values):
        torch.testing.assert_close(value, named[name.replace(".weight", ".default.weight")], rtol=1e-3, atol=5e-5)
