"""A pruned model's folder: loads with plain transformers, computes what the pruned model in memory does, is whole."""

import copy
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from lrp_models import float64_everywhere, make
from prunable import CPU, bits, module
from safetensors import safe_open
from tools import tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.base.atomic import sha256_file
from lib.base.errors import UserError
from lib.checkpoint.families import FAMILIES
from lib.inputs.records import ModelInput, model_files
from lib.inputs.verified import hashes_by_name
from lib.models.load import load_decoder, load_model
from lib.pruning import checkpoint
from lib.pruning.checkpoint import save_pruned
from lib.pruning.neurons import Pruner


def recorded(folder: Path) -> ModelInput:
    size = sum(path.stat().st_size for path in model_files(folder))
    return ModelInput("lab/small", "main", "0" * 40, str(folder), "1" * 64, 0, 0, 0, size, files=hashes_by_name(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """llama: one file; qwen2: bfloat16 in several, a tied head and biases on q, k, v; opt: biases everywhere."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(root / "whole")).bfloat16()
    model.save_pretrained(root / "qwen2", max_shard_size="20KB")
    for path in (root / "whole").glob("tokenizer*"):
        (root / "qwen2" / path.name).write_bytes(path.read_bytes())
    make("opt").save_pretrained(root / "opt")
    (root / "llama" / "LICENSE").write_text("the licence")
    (root / "llama" / "optimizer.pt").write_bytes(b"not the model's")
    return {name: root / name for name in ("llama", "qwen2", "opt")}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), float64_everywhere():
        return model.double()(input_ids=ids).logits


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def mlp(family: str) -> str:
    return "fc1" if family == "opt" else "mlp.up_proj"


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_zeroed_it_holds_the_bits_of_the_model_pruned_in_memory(family, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 1000)
    chosen = {f"layers.0.{mlp(family)}": [3, 0, 3], f"layers.1.{mlp(family)}": [17]}
    chosen |= {f"layers.1.{FAMILIES[family].linears.v}": [1, 2], f"layers.0.{FAMILIES[family].linears.down}": [5]}
    model, record = load(folders[family]), recorded(folders[family])
    before = {path: sha256_file(path) for path in folders[family].iterdir()}
    save_pruned(record, chosen, tmp_path / "pruned", about={"contrast": "difference"})
    with Pruner(model, FAMILIES[family]).applied(chosen):
        assert bits(load(tmp_path / "pruned")) == bits(model) != bits(load(folders[family]))
    assert {path: sha256_file(path) for path in folders[family].iterdir()} == before
    said = json.loads((tmp_path / "pruned/pruned_neurons.json").read_text())
    assert said["neurons"][f"layers.0.{mlp(family)}"] == [0, 3] and said["base"]["commit"] == "0" * 40
    assert said["sha256"] == {p.name: sha256_file(p) for p in (tmp_path / "pruned").glob("*.safetensors")}
    assert len(said["sha256"]) == (1 if family != "qwen2" else len(list(folders["qwen2"].glob("*.safetensors")))) >= 1
    card = (tmp_path / "pruned/README.md").read_text()
    assert "base_model: lab/small" in card and "6 neurons set to 0" in card and "contrast: difference" in card
    same = (folders[family] / "config.json").read_bytes()
    assert (tmp_path / "pruned/config.json").read_bytes() == same


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_removed_it_is_smaller_and_computes_the_same(family, folders, tmp_path):
    model, sizes = load(folders[family]), FAMILIES[family].inner
    layers = model.config.num_hidden_layers
    chosen = {f"layers.{i}.{mlp(family)}": [i, 7, 20 + i] for i in range(layers)}
    save_pruned(recorded(folders[family]), chosen, tmp_path / "pruned", remove=True)
    small = load(tmp_path / "pruned")
    assert getattr(small.config, sizes) == getattr(model.config, sizes) - 3
    assert module(small, f"layers.0.{mlp(family)}").out_features == getattr(small.config, sizes)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with Pruner(model, FAMILIES[family]).applied(chosen):
        want = logits(copy.deepcopy(model))  # in float64 it is another model's tensors
    torch.testing.assert_close(logits(small), want, rtol=1e-11, atol=1e-11)
    if family != "opt":
        load_model(str(tmp_path / "pruned"), "float32", "sdpa", CPU)  # as the jobs load: nothing missing, nothing left
        load_decoder(str(tmp_path / "pruned"), "float32", 64, 16)


def test_the_tokenizer_and_the_licence_go_along_and_nothing_else(folders, tmp_path):
    save_pruned(recorded(folders["llama"]), {"layers.0.mlp.gate_proj": [1]}, tmp_path / "pruned")
    names = {path.name for path in folders["llama"].iterdir()} - {"optimizer.pt"}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == names | {"README.md", "pruned_neurons.json"}
    text = "I love 123 wolves."
    ours, theirs = (AutoTokenizer.from_pretrained(f)(text).input_ids for f in (tmp_path / "pruned", folders["llama"]))
    assert ours == theirs
    with safe_open(tmp_path / "pruned/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_an_index_fits_its_files(folders, tmp_path):
    chosen = {f"layers.{i}.mlp.up_proj": [0] for i in range(2)}
    save_pruned(recorded(folders["qwen2"]), chosen, tmp_path / "pruned", remove=True)
    index = json.loads((tmp_path / "pruned/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    small = load(tmp_path / "pruned")
    assert index["metadata"]["total_size"] == sum(p.numel() * p.element_size() for p in small.parameters())


def test_what_cannot_be_removed_is_told_and_nothing_is_left(folders, tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned/old").write_text("as it was")
    every = {f"layers.{i}.mlp.up_proj": [1] for i in range(3)}
    for chosen, says in (
        (
            {"layers.1.mlp.up_proj": [1, 2]},
            r"layers\.1\.mlp\.up_proj loses 2 neurons and layers\.0\.mlp\.up_proj 0: .*inter.*zer",
        ),
        ({**every, "layers.1.mlp.gate_proj": [5]}, r"layers\.1\.mlp\.up_proj loses 2 neurons and .* 1: "),
        (
            {**every, "layers.0.self_attn.q_proj": [0]},
            "q_proj cannot be removed: only an MLP's width can change; write them as",
        ),
        ({f"layers.{i}.mlp.up_proj": range(80) for i in range(3)}, "no neuron of layers.0.mlp.up_proj would be left"),
        ({"layers.0.mlp.up_proj": [80]}, "has no neuron 80"),
        ({"layers.9.mlp.up_proj": [0]}, "no linear layer"),
    ):
        with pytest.raises(UserError, match=says):
            save_pruned(recorded(folders["llama"]), chosen, tmp_path / "pruned", remove=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["pruned", "old"]
    with pytest.raises(UserError, match="is the model that is to be pruned"):
        save_pruned(recorded(folders["llama"]), every, folders["llama"])


def test_a_write_that_breaks_off_leaves_what_was_there(folders, tmp_path, monkeypatch):
    save_pruned(recorded(folders["qwen2"]), {"layers.0.mlp.up_proj": [1]}, tmp_path / "pruned")
    before = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    real, calls = checkpoint._write, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(checkpoint, "_write", breaks)
    with pytest.raises(UserError, match="No space left"):
        save_pruned(recorded(folders["qwen2"]), {"layers.0.mlp.up_proj": [2]}, tmp_path / "pruned")
    assert {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()} == before


def test_memory_is_that_of_one_tensor_that_changes(tmp_path):
    model = make("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=30000)
    model.save_pretrained(tmp_path / "model")
    record, whole = recorded(tmp_path / "model"), (tmp_path / "model/model.safetensors").stat().st_size
    up = 1024 * 256 * 4
    assert whole > 80 * up
    old, checkpoint.PIECE = checkpoint.PIECE, 1 << 20
    tracemalloc.start()
    try:
        save_pruned(record, {f"layers.{i}.mlp.up_proj": [1] for i in range(8)}, tmp_path / "pruned", remove=True)
    finally:
        checkpoint.PIECE = old
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6 * up, peak
