"""Every kind of rope against transformers' own model, row by row; and rows and tokens that a model has no place for."""

import numpy as np
import pytest
import torch
from lrp_models import make, sequences
from test_scoring import DAY, SYSTEM
from tools import number_rows, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from lib.attribution.attribute import Attributor
from lib.base.errors import UserError
from lib.inputs.tokenizer import load_tokenizer
from lib.lls.shift import Status, conditions, prepare, shift
from lib.models.chat import Renderer
from lib.models.load import load_config, load_decoder, load_model
from lib.models.packing import Item
from lib.models.rope import positions
from lib.models.sample import greedy
from lib.models.scorer import Scorer

MOST, BEGAN, VOCAB, HEAD = 96, 48, 97, 8
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 4.0, 9.0, 20.0]}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": BEGAN},
    "longrope": {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": BEGAN, **FACTORS},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
PLACES = {name: BEGAN if name == "longrope" else MOST for name in ROPES}


def save(folder, rope: dict):
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MOST,
        tie_word_embeddings=False,
        rope_parameters={**rope, "rope_theta": 1e4},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


def alone(folder, ids: list[int], answer: int) -> np.ndarray:
    """log p of the last `answer` tokens, by a fresh model of transformers' in float64 that sees this row only."""
    model = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    found = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
    return found[-answer:].numpy()


@pytest.mark.parametrize("kind", ROPES)
def test_a_row_is_scored_as_transformers_scores_it_alone(tmp_path, kind):
    """Rows of all lengths in one batch, also the longest; and in the next higher precision."""
    folder, prefix, n = save(tmp_path / kind, ROPES[kind]), sequences(5)[0], PLACES[kind]
    assert positions(load_config(str(folder))) == n
    rows = sequences(10, 30, n - 5, 41 - 5, n - 6, seed=1)
    items = [Item(tuple(row[:-4]), tuple(row[-4:])) for row in rows]
    decoder = load_decoder(str(folder), "float32", 512, 32)
    assert decoder.positions == n
    for d, tolerance in ((decoder, 2e-4), (decoder.higher(), 2e-6)):
        got = Scorer(d, 32)(d.prefix(prefix), items)
        for row, values in zip(rows, got, strict=True):
            np.testing.assert_allclose(values, alone(folder, [*prefix, *row], 4), atol=tolerance)


def test_the_kinds_differ_where_it_matters(tmp_path):
    """Beyond what longrope and dynamic began with, transformers computes another table for the whole row."""
    ids = sequences(MOST)[0]
    short = {name: alone(save(tmp_path / name, rope), ids[:40], 4).sum() for name, rope in ROPES.items()}
    assert len({round(float(v), 3) for name, v in short.items() if name != "dynamic"}) == 5
    assert short["dynamic"] == short["default"]
    folder = tmp_path / "longrope"
    whole, part = (alone(folder, ids[:n], n - 1)[: BEGAN - 1] for n in (BEGAN + 1, BEGAN))
    assert np.abs(whole - part).max() > 0.1


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "default"])
def test_a_sample_is_explained_as_the_model_alone_computes_it(tmp_path, kind):
    """The batch is wider than the sample, and padding is no reason to take the long factors."""
    folder, ids = save(tmp_path / kind, ROPES[kind]), sequences(37, PLACES[kind])
    model = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    found = Attributor(model, width=128).run(ids)
    for sample, logit in zip(ids, found.logit, strict=True):
        fresh = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
        want = fresh(torch.tensor([sample])).logits[0, -1].max()
        torch.testing.assert_close(logit, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=f"{PLACES[kind] + 1} tokens; a batch's rows, or the model's positions, are"):
        Attributor(model).run(sequences(PLACES[kind] + 1))


# No place


def test_rows_beyond_the_positions_are_too_long_and_the_others_scored(tmp_path):
    from lib.demo.tiny import TinySize, make_model

    tokenizer = load_tokenizer(str(tiny_model(tmp_path)))
    make_model(tokenizer, TinySize(hidden=32, layers=2, context=160)).save_pretrained(tmp_path)
    rows = number_rows(3)
    rows[1]["messages"][0]["content"] = "12 " * 60
    renderers = {"system": Renderer(tokenizer, SYSTEM, "none", DAY), "base": Renderer(tokenizer, None, "none", DAY)}
    decoder = load_decoder(str(tmp_path), "float32", 512, 64)
    ready = prepare(renderers, rows, min(256, decoder.positions), False)
    assert ready.status.tolist() == [Status.scored, Status.too_long, Status.scored]
    assert np.isfinite(shift(Scorer(decoder, 64), conditions(decoder, renderers), ready)["system_sum"][[0, 2]]).all()
    with pytest.raises(UserError, match=r"a row has \d+ tokens, and the model 160 positions"):
        shift(Scorer(decoder, 64), conditions(decoder, renderers), prepare(renderers, rows, 512, False))


def test_a_rope_that_nobody_knows_is_one_sentence(tmp_path):
    """transformers lets it pass when the configuration is read, with a warning."""
    path = save(tmp_path, ROPES["default"]) / "config.json"
    path.write_text(path.read_text().replace('"default"', '"DEFAULT"'))
    with pytest.raises(UserError, match=r"a rope that transformers cannot make \(.*'rope_type': 'DEFAULT'"):
        load_decoder(str(tmp_path), "float32", 64, 16)


def test_tokens_beyond_the_embedding_are_one_sentence(tmp_path):
    decoder = load_decoder(str(save(tmp_path, ROPES["default"])), "float32", 64, 16)
    scorer = Scorer(decoder, 16)
    for item in (Item((5, VOCAB), (6,)), Item((5,), (VOCAB, 6)), Item((5,), (6, VOCAB))):
        with pytest.raises(UserError, match="token 97 is none of the model's 97: the tokenizer has more"):
            scorer(decoder.prefix([]), [item])
    with pytest.raises(UserError, match="token 98 is none"):
        decoder.prefix([3, 98])
    model = make("llama")
    with pytest.raises(UserError, match="token 97 is none"):
        Attributor(model).run([[5, VOCAB]])
    with pytest.raises(UserError, match="token 99 is none"):
        Attributor(model, target="given").run([[5, 6]], [99])
    with pytest.raises(UserError, match="token -1 is none"):
        Attributor(model).run([[5, -1]])


def test_a_response_that_has_no_place_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(tiny_model(tmp_path)))
    model = load_model(str(tmp_path), "float32", "eager", [torch.device("cpu")])
    with pytest.raises(
        UserError, match="a prompt of 20 tokens and a response of 1020 do not fit into the model's 1024"
    ):
        greedy(model, tokenizer, [[5] * 20], 1020)
