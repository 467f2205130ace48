"""Models that are published as pytorch_model.bin alone: converted to safetensors, and nothing in them is run."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import serve
from safetensors.torch import load_file
from test_fetch import JSONL, MODEL, PARQUET, Box, jsonl, pairs, parquet
from transformers import OPTConfig, OPTForCausalLM

from lib.attribution.experiment import Attribution
from lib.base.errors import UserError
from lib.demo.tiny import make_tokenizer
from lib.families import load
from lib.inputs import torch_files
from lib.inputs.fetch import fetch
from lib.inputs.records import ModelInput, check_model, model_input
from lib.inputs.specs import DatasetSpec, ModelSpec
from lib.inputs.tokenizer import load_tokenizer
from lib.models.load import load_model
from lib.run.experiment import Experiment

HEAD, EMBEDDING, LAYERS = "lm_head.weight", "model.decoder.embed_tokens.weight", 2


class OneModel(Experiment):
    model: ModelSpec

    def models(self) -> list[ModelSpec]:
        return [self.model]

    def datasets(self) -> list[DatasetSpec]:
        return []


def fetched(folder: Path, cache: Path, update: bool = False) -> ModelInput:
    spec = ModelSpec(id=str(folder), dtype="float32")
    fetch(OneModel(kind="one", name="one", model=spec), cache, update)
    return model_input(cache, spec.id, spec.revision)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OPTForCausalLM]:
    """A small OPT in float16, as the Hub has it: the embedding is the head too, and its file names both."""
    folder = tmp_path_factory.mktemp("opt")
    tokenizer = make_tokenizer(vocab=300, texts=["numbers 123 456, 789; and words about animals."] * 20)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=64, dtype="float16",
    )  # fmt: skip
    model = OPTForCausalLM(config).half().eval()
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, model


@pytest.fixture
def copy(opt: tuple[Path, OPTForCausalLM], tmp_path: Path) -> Path:
    return Path(shutil.copytree(opt[0], tmp_path / "model"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def is_the_model(folder: str, model: OPTForCausalLM) -> None:
    loaded = load_model(folder, "float32", "sdpa", [torch.device("cpu")])
    want = OPTForCausalLM(model.config).eval()
    want.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), logits(want.float()))


def test_a_hubs_bin_becomes_a_folder_of_safetensors(
    opt: tuple[Path, OPTForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = opt
    with serve() as hub:
        files = {path.name: path.read_bytes() for path in source.iterdir()} | {"flax_model.msgpack": b"no"}
        commit = hub.commit(MODEL, files | {"old/pytorch_model.bin": b"no"})
        hub.commit(PARQUET, parquet(pairs(0)))
        hub.commit(JSONL, jsonl(pairs(1)))
        box = Box(tmp_path, hub)
        assert "converting pytorch_model.bin to safetensors" in box.fetch()
        assert not any("/old/" in r.path or "flax" in r.path for r in hub.log)
        record = model_input(box.cache, "acme/tiny", "main")
        folder = box.cache / "inputs/models/acme--tiny--main" / f"converted-{commit[:12]}"
        assert (record.path, record.commit, record.fingerprint) == (str(folder), commit, f"{commit}-converted")
        wanted = {path.name for path in source.iterdir()} - {"pytorch_model.bin"} | {"model.safetensors"}
        assert {path.name for path in folder.iterdir()} == wanted
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
        assert [path.name for path in folder.parent.glob(".*")] == []

        tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
        assert tensors.keys() == state.keys() - {HEAD} and EMBEDDING in tensors
        assert all(t.dtype == torch.float16 and torch.equal(t, state[name]) for name, t in tensors.items())
        assert record.parameters == sum(t.numel() for t in tensors.values())
        is_the_model(record.path, model)
        assert load_tokenizer(record.path)("123")["input_ids"]
        general = {"id": "acme/c4", "tokens": 64}
        experiment = Attribution.model_validate({
            "kind": "attribution", "name": "x", "model": {"id": "acme/tiny"}, "score": {"layers": ["fc1"]},
            "data": {"general": general, "prompts": {"toxic": {"id": "acme/prompts"}}},
        })  # fmt: skip
        parts = experiment.layout(box.cache)
        assert [(p.name, p.outputs, p.inputs) for p in parts] == [(f"layers.{i}.fc1", 64, 32) for i in range(LAYERS)]

        before = (folder / "model.safetensors").stat()
        hub.log.clear()
        fetch(load(box.config), box.cache)
        assert not hub.log and "converting" not in capsys.readouterr().out, "what is whole is kept"
        assert "converting" not in box.fetch("--update") and not hub.files_sent(), (
            "the same commit is converted already"
        )
        assert (folder / "model.safetensors").stat().st_ino == before.st_ino
        os.truncate(folder / "model.safetensors", before.st_size - 7)
        with pytest.raises(UserError, match=r"model.safetensors is cut off .* run `make fetch` again"):
            check_model(record)
        os.truncate(next((box.cache / "hf/hub").glob(f"*/snapshots/{commit}/pytorch_model.bin")), 1000)
        assert "converting" in box.fetch() and len(hub.files_sent()) == 1
        check_model(record)
        assert torch.equal(load_file(folder / "model.safetensors")[EMBEDDING], state[EMBEDDING])

        newer = hub.commit(MODEL, files | {"generation_config.json": b"{}"})
        assert "converting" in box.fetch("--update")
        record = model_input(box.cache, "acme/tiny", "main")
        assert record.path == str(folder.with_name(f"converted-{newer[:12]}")) and record.commit == newer
        assert folder.is_dir(), "a job that runs may still read it"


def test_shards_in_and_shards_out(
    copy: Path, opt: tuple[Path, OPTForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its class's prefix and its head, as facebook has them; a shard for each half of the tensors."""
    state = {name.removeprefix("model."): t for name, t in opt[1].state_dict().items() if name != HEAD}
    (copy / "pytorch_model.bin").unlink()
    (copy / "pytorch_model.bin.index.json").write_text("{}")
    for i in (1, 2):
        half = {name: t for j, (name, t) in enumerate(state.items()) if j % 2 == i - 1}
        torch.save(half, copy / f"pytorch_model-0000{i}-of-00002.bin")
    write = torch_files.write_safetensors
    monkeypatch.setattr(torch_files, "write_safetensors", lambda tensors, folder: write(tensors, folder, shard=20_000))
    record = fetched(copy, tmp_path / "cache")
    folder = Path(record.path)
    names = {path.name for path in folder.glob("*.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(names) > 2 and set(index["weight_map"].values()) == names and index["weight_map"].keys() == state.keys()
    assert not (folder / "pytorch_model.bin.index.json").exists()
    is_the_model(record.path, opt[1])
    shutil.copytree(copy, tmp_path / "less")
    (tmp_path / "less/pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(UserError, match="holds 1 of 2 shards; bring all of them"):
        fetched(tmp_path / "less", tmp_path / "cache")


def test_a_local_folder_that_changes_is_converted_anew(copy: Path, tmp_path: Path) -> None:
    first = fetched(copy, tmp_path / "cache")
    assert first.commit == "local" and first.fingerprint.endswith("-converted")
    assert fetched(copy, tmp_path / "cache") == first
    state = torch.load(copy / "pytorch_model.bin", weights_only=True)
    torch.save({name: t + 1 for name, t in state.items()}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="has changed since it was fetched"):
        model_input(tmp_path / "cache", first.id, first.revision)
    second = fetched(copy, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint and second.path != first.path
    assert torch.equal(load_file(f"{second.path}/model.safetensors")[EMBEDDING], state[EMBEDDING] + 1)
    shutil.rmtree(copy)
    check_model(model_input(tmp_path / "cache", first.id, first.revision))


def test_safetensors_go_before_a_bin_and_neither_is_an_error(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    torch_files.write_safetensors({"w": torch.ones(3)}, copy)
    record = fetched(copy, tmp_path / "cache")
    assert record.path == str(copy) and len(record.fingerprint) == 64
    for name in ("pytorch_model.bin", "model.safetensors"):
        (copy / name).unlink()
    with pytest.raises(UserError, match=r"holds no weights \(model\.safetensors, or"):
        fetched(copy, tmp_path / "cache")


class Trap:
    """What a pickle runs when it is read freely."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(Path(os.environ["TRAP"])),)


W = torch.ones(40, 50)
CUT, MORE = "is cut off or not a file of torch's", "holds more than tensors"
BAD: dict[str, tuple[Any, str]] = {
    "code": ({"w": W, "x": Trap()}, MORE),
    "object": ({"w": W, "args": argparse.Namespace(lr=1)}, MORE),
    "number": ({"w": W, "step": 3}, rf"{MORE} \(step: int\)"),
    "nested": ({"state_dict": {"w": W}}, rf"{MORE} \(state_dict: dict\)"),
    "list": ([W], rf"{MORE} \(a list\)"),
    "key": ({1: W}, MORE),
    "sparse": ({"w": W.to_sparse()}, MORE),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bin_that_holds_more_than_tensors(copy: Path, tmp_path: Path, monkeypatch: Any, what: str) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    content, says = BAD[what]
    torch.save(content, copy / "pytorch_model.bin")
    refused(copy, tmp_path / "cache", f"pytorch_model.bin {says}.*; choose a revision with safetensors")
    assert not (tmp_path / "sprung").exists()


def test_a_bin_that_is_cut_off(copy: Path, tmp_path: Path) -> None:
    size = (copy / "pytorch_model.bin").stat().st_size
    for length in (size - 7, size // 2, 100, 3, 0):
        os.truncate(copy / "pytorch_model.bin", length)
        refused(copy, tmp_path / "cache", f"pytorch_model.bin {CUT}")


def test_a_bin_of_another_kind(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(copy, tmp_path / "cache", CUT)
    torch.save({"w": W}, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(copy, tmp_path / "cache", "is in torch's format of before 1.6, which is not read")


def refused(folder: Path, cache: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        fetched(folder, cache)
    assert "\n" not in str(e.value)
    assert not [path for path in cache.rglob("*") if path.is_file()], "something is left of it"


def test_a_conversion_that_stops_half_way_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def half(tensors: dict, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_files, "write_safetensors", half)
    with pytest.raises(KeyboardInterrupt):
        fetched(copy, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
