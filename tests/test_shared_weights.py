"""transformers' model on the decoder's weights: the same memory, and transformers' own results bit for bit."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tools import tiny_llama, tiny_model, tiny_relative

from lib.base.errors import UserError
from lib.evaluation.log_probs import by_decoder, by_model
from lib.evaluation.perplexity import plan
from lib.models.load import load_decoder, load_model
from lib.models.scorer import Scorer
from lib.models.shared import model_of

CPU = torch.device("cpu")
MAKERS = {
    "llama": tiny_llama,
    "qwen2, tied": tiny_model,
    "qwen2": partial(tiny_relative, classes="Qwen2", tie_word_embeddings=False),
    "qwen3": partial(tiny_relative, classes="Qwen3", head_dim=16),
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    return str(MAKERS[request.param](tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(folder, "float32", 128, 32)


@pytest.fixture
def shared(folder, decoder):
    return model_of(decoder, folder)


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def decoders(decoder) -> list[torch.Tensor]:
    found = [decoder.weights.embedding, decoder.weights.norm, decoder.weights.head]
    for layer in decoder.weights.layers:
        parts = [layer.norm1, layer.qkv, layer.qkv_bias, layer.o, layer.norm2, layer.gate_up, layer.down]
        found += [part for part in [*parts, *(layer.head_norms or ())] if part is not None]
    return found


def test_nothing_is_copied(decoder, shared):
    assert storages(shared.parameters()) == storages(decoders(decoder))
    values = {id(parameter): parameter.numel() for parameter in shared.parameters()}
    assert sum(values.values()) == sum({t.data_ptr(): t.numel() for t in decoders(decoder)}.values())
    assert not [name for name, t in [*shared.named_parameters(), *shared.named_buffers()] if t.is_meta]
    tied = decoder.weights.head is decoder.weights.embedding
    assert (shared.lm_head.weight is shared.model.embed_tokens.weight) == tied


def test_it_is_the_model_that_transformers_loads(folder, shared):
    plain = load_model(folder, "float32", "sdpa", [CPU])
    ids = torch.randint(0, 290, (3, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(ids).logits, shared(ids).logits)
    assert plain.state_dict().keys() == shared.state_dict().keys()
    assert all(torch.equal(value, shared.state_dict()[name]) for name, value in plain.state_dict().items())
    assert shared.config.to_dict() == plain.config.to_dict() and not shared.training
    assert shared.generation_config.to_dict() == plain.generation_config.to_dict()
    how = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(plain.generate(ids, **how), shared.generate(ids, **how))
    for name, value in plain.named_buffers():
        assert torch.equal(value, dict(shared.named_buffers())[name])


def test_what_is_zeroed_in_either_is_zeroed_in_both(decoder, shared):
    windows = plan("window", [np.random.default_rng(0).integers(0, 290, 96).astype(np.int32)], 32)

    def scores() -> list[np.ndarray]:
        ours, theirs = by_decoder(Scorer(decoder, 32), windows), by_model(shared, windows)
        np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), rtol=1e-3, atol=1e-3)
        return ours

    before = np.concatenate(scores())
    inner, layer = decoder.shape.inner, decoder.weights.layers[1]
    mlp, kept = shared.model.layers[1].mlp, layer.gate_up.clone()
    layer.gate_up[inner:] = 0  # all of up, in the decoder
    assert not mlp.up_proj.weight.any() and mlp.gate_proj.weight.any()
    without_up = np.concatenate(scores())
    layer.gate_up.copy_(kept)
    mlp.gate_proj.weight[5] = 0  # a row of gate, in transformers' model
    shared.model.layers[0].self_attn.k_proj.weight[3] = 0
    q = decoder.shape.heads * decoder.shape.head
    rows = decoder.weights.layers[0].qkv
    assert not layer.gate_up[5].any() and not rows[q + 3].any() and rows[3].any() and rows[q + 4].any()
    without_rows = np.concatenate(scores())
    assert np.abs(without_up - before).max() > 0.1 and np.abs(without_rows - before).max() > 1e-3


def test_what_cannot_be_shared_is_said(tmp_path):
    folder = str(tiny_llama(tmp_path))
    decoder = load_decoder(folder, "float32", 64, 32)
    (tmp_path / "generation_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        model_of(decoder, folder)
    decoder.weights.embedding = decoder.weights.embedding.to("meta")
    with pytest.raises(UserError, match="the embedding lies in host memory"):
        model_of(decoder, folder)
