"""Perplexity by each convention against plain loops in float64, written from the conventions' own code."""

import math
import re

import numpy as np
import pytest
import torch
from tools import tiny_llama, tiny_relative
from transformers import OPTConfig, OPTForCausalLM

from lib.base.errors import UserError
from lib.evaluation.log_probs import by_decoder, by_model
from lib.evaluation.perplexity import label, perplexity, plan, prefix_token
from lib.inputs.tokenizer import load_tokenizer
from lib.models.load import load_decoder, load_model
from lib.models.scorer import Scorer

CPU = torch.device("cpu")
W, VOCAB, PREFIX = 32, 290, 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """Its layers wider than its embedding, as OPT-350M's, and sharp."""
    sizes = {"hidden_size": 32, "ffn_dim": 56, "num_attention_heads": 4, "word_embed_proj_dim": 24}
    torch.manual_seed(2)
    config = OPTConfig(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=64, dropout=0.0, **sizes)
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    model.save_pretrained(folder := tmp_path_factory.mktemp("opt"))
    return folder


def both(folder, batch_tokens=96):
    decoder = load_decoder(str(folder), "float32", batch_tokens, 16)
    model = load_model(str(folder), "float32", "sdpa", [CPU])
    return {
        "decoder": lambda windows: by_decoder(Scorer(decoder, 16), windows),
        "model": lambda windows: by_model(model, windows, rows=3, block=20),
    }


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def losses(model64, ids: list[int]) -> np.ndarray:
    """-log p of all tokens but the first, in one plain forward."""
    with torch.no_grad():
        logits = model64(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    assert logits.dtype == torch.float64
    return -torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].numpy()


def by_wanda(model64, ids: np.ndarray) -> float:
    """locuslab/wanda, lib/eval.py: nlls are loss * seqlen, divided by nsamples * seqlen."""
    nsamples = len(ids) // W
    nlls = [losses(model64, ids[i * W : (i + 1) * W].tolist()).mean() * W for i in range(nsamples)]
    return math.exp(sum(nlls) / (nsamples * W))


def by_the_seed(model64, ids: np.ndarray, stride: int) -> float:
    """The seed's loop, with labels of -100 and the shift by one that transformers' loss does."""
    nlls, end_loc = [], 0
    for i in range(0, len(ids), stride):
        begin_loc, end_loc = max(i + stride - W, 0), min(i + stride, len(ids))
        trg_len = end_loc - i
        input_ids = ids[begin_loc:end_loc].tolist()
        labels = np.array(input_ids)
        labels[:-trg_len] = -100
        kept = labels[1:] != -100
        nlls.append(losses(model64, input_ids)[kept].mean() * trg_len)
    return math.exp(sum(nlls) / end_loc)


def by_the_harness(model64, pages: list[np.ndarray], words: int) -> float:
    """Rolling log-likelihood: token by token what is in the window of the one that predicts it."""
    total = 0.0
    for page in pages:
        tokens, predicted = [PREFIX, *page.tolist()], 0
        while predicted < len(page):
            n = min(W, len(page) - predicted)
            end = predicted + n
            inputs = tokens[max(0, end - W) : end + 1] if predicted else tokens[: n + 1]
            total -= losses(model64, inputs)[-n:].sum()
            predicted = end
    return math.exp(-total / words)


@pytest.mark.parametrize("length", [32 * 5, 32 * 5 + 13, 33, 32 * 4 + 1])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_convention_is_its_own_loop_in_float64(request, family, length):
    folder = request.getfixturevalue(family)
    model64, ids = load_model(str(folder), "float64", "eager", [CPU]), text(length)
    pages = [text(n, seed=n) for n in (1, 2, W - 1, W, W + 1, 2 * W, 2 * W + 7, 0, 3 * W + 31)]
    expected = {
        "window": by_wanda(model64, ids),
        "stride": by_the_seed(model64, ids, W // 4),
        "word": by_the_harness(model64, pages, 211),
    }
    assert len({round(math.log(value), 2) for value in expected.values()}) == 3
    model = load_model(str(folder), "float32", "sdpa", [CPU])
    backs = both(folder) if family == "llama" else {"model": lambda windows: by_model(model, windows, rows=3, block=20)}
    for convention, value in expected.items():
        rows, words = (pages, 211) if convention == "word" else ([ids], None)
        windows = plan(convention, rows, W, PREFIX)
        for name, back in backs.items():
            found = back(windows)
            assert [len(x) for x in found] == [len(w.ids) - w.first for w in windows]
            assert perplexity(windows, found, words) == pytest.approx(value, rel=2e-4), (convention, name)


def test_a_window_has_the_same_bits_in_any_company(llama):
    windows = plan("word", [text(n, seed=n) for n in (5, 2 * W, 3 * W + 9, 20, W)], W, PREFIX)
    longest = [w for w in windows if w.inputs == W]
    for back in both(llama).values():
        whole = back(windows)
        order = np.random.default_rng(1).permutation(len(windows))
        for i, values in zip(order, back([windows[i] for i in order]), strict=True):
            np.testing.assert_array_equal(values, whole[i])
        alone = back(longest[-1:])  # of the same width as all
        np.testing.assert_array_equal(alone[0], whole[windows.index(longest[-1])])


def test_every_token_is_scored_once_by_stride_and_by_word():
    ids = text(3 * W + 11)
    scored = np.concatenate([w.ids[w.first :] for w in plan("stride", [ids], W)])
    np.testing.assert_array_equal(scored, ids[1:])
    pages = [text(n, seed=n) for n in (1, W, W + 1, 70)]
    scored = np.concatenate([w.ids[w.first :] for w in plan("word", pages, W, PREFIX)])
    np.testing.assert_array_equal(scored, np.concatenate(pages))
    assert all(w.inputs <= W for w in plan("word", pages, W, PREFIX))


def test_another_window_is_part_of_the_name():
    assert [label(c) for c in ("window", "stride", "word")] == ["window2048", "stride512", "word"]
    names = [label(c, 128) for c in ("window", "stride", "word")]
    assert names == ["window128", "stride32-of-128", "word-of-128"]


def test_what_cannot_be_measured_is_one_sentence(llama, opt):
    for convention in ("window", "stride"):
        with pytest.raises(UserError, match=r"the text has 31 tokens, fewer than one window of 32"):
            plan(convention, [text(31)], W)
    with pytest.raises(UserError, match="the pages hold not one token"):
        plan("word", [text(0)], W, PREFIX)
    model = load_model(str(opt), "float32", "sdpa", [CPU])
    with pytest.raises(UserError, match="a window of 99 tokens is longer than the model's 64 positions; lower"):
        by_model(model, plan("window", [text(100)], 100))
    with pytest.raises(UserError, match="a window of 2999 tokens is longer than the model's 2048 positions"):
        both(llama)["decoder"](plan("window", [text(3000)], 3000))
    with pytest.raises(UserError, match="a window of 99 tokens does not fit into batches of 96"):
        both(llama)["decoder"](plan("window", [text(100)], 100))
    with pytest.raises(UserError, match=re.escape(f"token {VOCAB} is none of the model's {VOCAB}")):
        by_model(model, plan("window", [np.full(W, VOCAB)], W))


def test_nan_is_no_perplexity_and_a_ruined_model_has_an_infinite_one():
    windows = plan("window", [text(2 * W)], W)
    values = [np.full(W - 1, -2.0, np.float32), np.full(W - 1, -4.0, np.float32)]
    assert perplexity(windows, values) == pytest.approx(math.exp(3))
    assert perplexity(windows, [values[0], values[1] * 1000]) == math.inf
    values[1][3] = np.nan
    with pytest.raises(UserError, match="a log-probability is not a number"):
        perplexity(windows, values)


def test_a_page_begins_with_bos_or_else_eos(llama):
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.bos_token is None and prefix_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.bos_token = "<|im_start|>"
    assert prefix_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_relative_with_a_tied_head(tmp_path):
    folder = tiny_relative(tmp_path, "Qwen2", tie_word_embeddings=True)
    model64, ids = load_model(str(folder), "float64", "eager", [CPU]), text(4 * W)
    windows = plan("window", [ids], W)
    for back in both(folder).values():
        assert perplexity(windows, back(windows)) == pytest.approx(by_wanda(model64, ids), rel=2e-4)
