"""A model's folder: each tensor once, of its shape, from the files that count; or one sentence, from every loader."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_sets import scorer
from tools import tiny_llama, tiny_model
from transformers import AutoModelForCausalLM

from lib.base.errors import UserError
from lib.checkpoint.headers import file_tensors, folder_tensors
from lib.checkpoint.layers import linear_weights
from lib.inputs.fetch import _tokenizer
from lib.inputs.tokenizer import load_tokenizer
from lib.inputs.torch_files import write_safetensors
from lib.models.classifier import load_classifier
from lib.models.load import load_config, load_decoder, load_model

CPU = torch.device("cpu")


def by_scorer(folder: Path) -> object:
    return load_decoder(str(folder), "float32", 64, 16)


def by_transformers(folder: Path) -> object:
    return load_model(str(folder), "float32", "eager", [CPU])


LOADERS = [by_scorer, by_transformers]


@pytest.fixture
def llama(tmp_path) -> Path:
    return tiny_llama(tmp_path / "llama")


def change(folder: Path, how: Callable[[dict], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def renamed(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def reshaped(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(79, 48)


CHANGES = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight"),
    "renamed": (renamed, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    "no head": (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight"),
    "shape": (reshaped, r"model\.layers\.1\.mlp\.up_proj\.weight (has|of) shape \(79, 48\)"),
    "one more": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), r"q_proj\.bias"),
    "layers more": (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(80, 48)}), r"layers\.3\.mlp"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_is_missing_misnamed_misshapen_or_too_many_is_named(llama, load, what):
    how, says = CHANGES[what]
    load(llama)
    with pytest.raises(UserError, match=says):
        load(change(llama, how))


def test_one_parameter_under_two_names_is_refused(llama):
    """transformers takes a base model's names too: then two of the file's tensors would be one parameter."""
    change(llama, lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.zeros(80, 48)}))
    with pytest.raises(UserError, match=r"under two names layers\.0\.mlp\.up_proj"):
        by_transformers(llama)
    with pytest.raises(UserError, match=r"hold layers\.0\.mlp\.up_proj\.weight, which this model does not use"):
        by_scorer(llama)
    with pytest.raises(UserError, match=r"hold layers\.0\.mlp\.up_proj twice"):
        linear_weights(folder_tensors(llama))


@pytest.mark.parametrize("load", LOADERS)
def test_what_may_be_absent_or_old_loads(tmp_path, load):
    """A tied head that is not in the file, or is there as the same; rope's frequencies of old checkpoints."""
    folder = tiny_model(tmp_path / "tied")
    names = set(load_file(folder / "model.safetensors"))
    assert "lm_head.weight" not in names and json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    load(folder)
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(folder)
    change(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"tie_word_embeddings\), and the weights hold another lm_head.weight"):
        load(folder)


NUMBERS = {
    "negative": ({"num_key_value_heads": -1}, r"cannot be true of a model: num_key_value_heads=-1;"),
    "zero": ({"num_hidden_layers": 0}, r"num_hidden_layers=0|cannot be read"),
    "half": ({"hidden_size": 32.5}, r"hidden_size=32\.5|cannot be read"),
    "uneven": ({"num_key_value_heads": 3}, r"num_attention_heads=\d, num_key_value_heads=3|cannot be read"),
    "beyond all": ({"vocab_size": 1 << 40}, r"vocab_size=1099511627776"),
    "beyond the memory": ({"intermediate_size": 1 << 24}, r"mlp\.\w+\.weight has shape .*, config\.json says"),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_config_that_lies_is_refused_before_memory_is_taken_for_it(tmp_path, what):
    change_to, says = NUMBERS[what]
    folder = tiny_model(tmp_path / "model", hidden=64, heads=4, kv_heads=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change_to))
    with pytest.raises(UserError, match=says):
        by_scorer(folder)


def test_a_classifier_has_every_tensor_too(tmp_path):
    folder = scorer(tmp_path / "judge", ["toxic"])
    load_classifier(str(folder), "float32", CPU)
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    for how, says in (
        (lambda t: t.pop(name), f"its file lacks {name}"),
        (lambda t: t.update({name: torch.zeros(3, 3)}), rf"{name} of shape \(3, 3\), not \(32, 48\)"),
        (lambda t: t.update({"bert.more": torch.zeros(3)}), "does not use, bert.more"),
    ):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=says):
            load_classifier(str(change(folder, how)), "float32", CPU)


# Headers


def write(path: Path, header: str | dict, data: bytes = b"", length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first: int, last: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


A, B = entry(0, 8, [2]), entry(8, 16, [1, 2])
LIES = {
    "F32 as F64": ({"a": entry(0, 8, [2], "F64")}, 8, "a is .2. of F64 and lies at"),
    "shape too large": ({"a": entry(0, 8, [3])}, 8, "another size"),
    "overlap": ({"a": A, "b": entry(4, 12, [2])}, 12, "b does not begin where the tensor before it ends"),
    "hole": ({"a": A, "b": entry(12, 20, [2])}, 20, "b does not begin"),
    "late start": ({"a": entry(4, 12, [2])}, 12, "a does not begin"),
    "more data": ({"a": A}, 12, "bytes, its header says"),
    "less data": ({"a": A, "b": B}, 12, "bytes, its header says"),
    "backwards": ({"a": entry(8, 0, [2])}, 8, "another size"),
    "negative": ({"a": entry(0, 8, [-2])}, 8, "has the shape"),
    "negative twice": ({"a": entry(0, 8, [-1, -2])}, 8, "has the shape"),
    "huge": ({"a": entry(0, 1 << 70, [1 << 68])}, 8, "has the shape"),
    "float": ({"a": entry(0, 8, [2.0])}, 8, "has the shape"),
    "true": ({"a": entry(0, 4, [True])}, 4, "has the shape"),
    "type": ({"a": entry(0, 8, [2], "F33")}, 8, "unknown type F33"),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not described"),
    "no table": ("[1, 2]", 0, "its header does not begin with a brace"),
    "metadata": ({"__metadata__": {"format": 4}, "a": A}, 8, "__metadata__ holds something else than texts"),
    "no metadata": ({"__metadata__": ["pt"], "a": A}, 8, "__metadata__ holds something else than texts"),
    "no JSON": ('{"a": ', 0, "not a safetensors file"),
    "twice": (f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', 8, "a stands in it twice"),
    "deep": ("[" * 100_000, 0, "not a safetensors file"),
    "digits": (f'{{"a": {"1" * 5000}}}', 0, "not a safetensors file"),
}


def test_a_true_header_is_believed(tmp_path):
    path = write(
        tmp_path / "x", {"__metadata__": {"format": "pt"}, "b": B, "a": A, "none": entry(16, 16, [0, 3])}, bytes(16)
    )
    found = file_tensors(path)
    assert {name: (t.shape, t.bytes) for name, t in found.items()} == {
        "a": ((2,), 8),
        "b": ((1, 2), 8),
        "none": ((0, 3), 0),
    }
    assert path.stat().st_size == found["b"].offset + 8


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused(tmp_path, what):
    header, size, says = LIES[what]
    with pytest.raises(UserError, match=says):
        file_tensors(write(tmp_path / "model.safetensors", header, bytes(size)))


@pytest.mark.parametrize("length", [1 << 63, 1 << 31, 10_000])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    with pytest.raises(UserError, match="header is longer than it may be"):
        file_tensors(write(tmp_path / "model.safetensors", {"a": A}, bytes(8), length))


@pytest.mark.parametrize("load", LOADERS)
def test_a_tensor_under_a_wider_type_is_refused_by_both_loaders(llama, load):
    path = llama / "model.safetensors"
    data = path.read_bytes()
    at = data.index(b'"model.norm.weight":{"dtype":"F32"')
    path.write_bytes(data[:at] + data[at:].replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(UserError, match=r"model\.norm\.weight is .48. of F64"):
        load(llama)


# Folders


@pytest.fixture
def sharded(llama) -> Path:
    """The same model in several files with an index."""
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    write_safetensors(tensors, llama, "40KB")
    assert len(list(llama.glob("model-*.safetensors"))) > 2
    return llama


def test_files_beside_an_index_are_left_alone(sharded):
    """Mistral's and Llama's repositories hold the same weights once more, in one file under other names."""
    want = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    save_file(
        {"tok_embeddings.weight": torch.ones(3, 3), "model.norm.weight": torch.ones(48)},
        sharded / "consolidated.safetensors",
    )
    assert by_scorer(sharded).weights.norm.equal(want["model.norm.weight"])
    got = by_transformers(sharded).state_dict()
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)
    assert folder_tensors(sharded).keys() == want.keys()


def test_one_whole_file_goes_before_others_without_an_index(llama):
    save_file({"model.norm.weight": torch.ones(48)}, llama / "another.safetensors")
    want = load_file(llama / "model.safetensors")["model.norm.weight"]
    assert by_scorer(llama).weights.norm.equal(want) and by_transformers(llama).model.norm.weight.equal(want)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def put_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("load", LOADERS)
def test_an_index_that_does_not_fit_its_files_is_refused(sharded, load):
    right = index_of(sharded)["weight_map"]
    files = sorted(set(right.values()), key=list(right.values()).count)[::-1]  # the fullest first
    name = next(n for n, file in right.items() if file == files[0])
    cases = [
        ({**right, name: files[1]}, f"{name} is {files[1]} by the index and {files[0]} by the headers"),
        ({**right, "more": files[0]}, "more is .* by the index and in none by"),
        ({n: f for n, f in right.items() if n != name}, f"{name} is in no file by the index"),
        ({**right, name: "../x.safetensors"}, "names no files beside it"),
        ({**right, name: "gone.safetensors"}, "gone.safetensors cannot be read"),
        ([1], "is no index of weights"),
    ]
    for weight_map, says in cases:
        put_index(sharded, weight_map)
        with pytest.raises(UserError, match=says):
            load(sharded)
    put_index(sharded, right)
    load(sharded)


@pytest.mark.parametrize("load", LOADERS)
def test_a_tensor_in_two_files_of_a_folder_is_refused(sharded, load):
    right = index_of(sharded)["weight_map"]
    name, file = next(iter(right.items()))
    other = next(f for f in right.values() if f != file)
    tensors = load_file(sharded / other) | {name: load_file(sharded / file)[name] + 1}
    save_file(tensors, sharded / other, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is in .* and in .*; remove one of the two"):
        load(sharded)


@pytest.mark.parametrize("load", LOADERS)
def test_a_whole_file_beside_an_index_of_others_is_refused(sharded, load):
    save_file({"model.norm.weight": torch.ones(48)}, sharded / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not fit its files"):
        load(sharded)


# What else a folder may ask for


@pytest.mark.parametrize("load", [*LOADERS, load_config, load_tokenizer])
def test_an_adapter_beside_a_model_is_refused(llama, load):
    """transformers would put it into the model, and the scorer would not."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules=["up_proj"])).save_pretrained(
        llama
    )
    assert (llama / "adapter_config.json").exists() and (llama / "config.json").exists()
    with pytest.raises(UserError, match=r"holds an adapter .*merge it"):
        load(llama)
    (llama / "adapter_config.json").unlink()
    (llama / "adapter_config.json").symlink_to("nowhere")  # transformers would follow it
    with pytest.raises(UserError, match=r"holds an adapter .*merge it"):
        load(llama)


@pytest.mark.parametrize("read", [load_tokenizer, _tokenizer], ids=["load", "fetch"])
def test_a_tokenizer_at_which_its_reader_panics_is_one_sentence(llama, read):
    """A merge is cut by the length of a prefix that it does not have: Rust's panic is no Exception of Python's."""
    path = llama / "tokenizer.json"
    said = json.loads(path.read_text())
    said["model"]["continuing_subword_prefix"] = "longer than any merge"
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"(cannot be read|is no tokenizer) \(range end index .*make fetch` again"):
        read(str(llama))


@pytest.mark.parametrize(
    "load", [*LOADERS, load_config, load_tokenizer, lambda f: load_classifier(str(f), "float32", CPU)]
)
@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_a_folder_is_never_run_nor_asked_about(llama, tmp_path, monkeypatch, load, model_type):
    mark = tmp_path / "it was run"
    (llama / "modeling_evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('yes')\n"
        "from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel\n"
    )
    config = json.loads((llama / "config.json").read_text())
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    (llama / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"asks for Python code of its own \(auto_map\), which is never run"):
        load(llama)
    assert not mark.exists()


def test_code_for_a_tokenizer_is_never_run(llama):
    about = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps({**about, "auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json asks for Python code"):
        load_tokenizer(str(llama))


@pytest.mark.parametrize("load", LOADERS)
def test_quantised_and_elsewhere_named_weights_are_refused(llama, load):
    config = json.loads((llama / "config.json").read_text())
    for key, value in (
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("transformers_weights", "other.safetensors"),
    ):
        (llama / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=key):
            load(llama)
