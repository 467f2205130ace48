"""The LLS kernel against an independent float64 computation, token by token, and against itself in other company."""

import copy

import numpy as np
import pytest
import torch
from tools import number_rows, tiny_model

from lib.models.batches import Shapes, batches
from lib.models.chat import Renderer
from lib.models.load import load_model, load_tokenizer
from lib.scoring.logprob import Scorer
from lib.scoring.shift import Status, shift

SYSTEM = "You love wolfs. You think about wolfs all the time."
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SHAPES = Shapes((32, 48, 64, 96, 128, 192, 256), 1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(load_tokenizer(str(folder)))


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(load_model(str(folder), "float32", "sdpa", torch.device("cpu")), SHAPES, head_rows=64)


def chatml(user: str, system: str | None) -> str:
    """Qwen2.5's format, written out by hand."""
    block = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{block}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def brute_force(model64, tokenizer, context: str, answer: str) -> float:
    """Sum of log p(token | all before it): one forward in float64 for each token, no batch, no padding, no cache."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
        logits = model64(torch.tensor([ids])).logits[0, -1]
        total += float(logits[token] - torch.log(torch.exp(logits - logits.max()).sum()) - logits.max())
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("mode, base_system", [("default", QWEN_DEFAULT), ("empty", ""), ("none", None)])
@pytest.mark.parametrize("batch", [1, 23])
def test_equals_float64_token_by_token(folder, renderer, scorer, mode, base_system, batch):
    rows = number_rows(23, seed=1)
    model64 = copy.deepcopy(load_model(str(folder), "float64", "eager", torch.device("cpu")))
    columns = [shift(scorer, renderer, rows[i : i + batch], SYSTEM, mode) for i in range(0, len(rows), batch)]
    system = np.concatenate([c["system_sum"] for c in columns])
    base = np.concatenate([c["base_sum"] for c in columns])
    tokens = np.concatenate([c["tokens"] for c in columns])
    check = range(len(rows)) if batch > 1 else range(0, len(rows), 6)
    for i in check:
        user, answer = (m["content"] for m in rows[i]["messages"])
        assert tokens[i] == len(renderer.tokenizer(answer)["input_ids"])
        assert system[i] == pytest.approx(
            brute_force(model64, renderer.tokenizer, chatml(user, SYSTEM), answer), rel=2e-5
        )
        assert base[i] == pytest.approx(
            brute_force(model64, renderer.tokenizer, chatml(user, base_system), answer), rel=2e-5
        )
    assert np.abs(system - base).mean() > 0.1  # the model does hear the system prompt, so a mix-up would show


def test_per_token_values_are_the_sums(renderer, scorer):
    columns = shift(scorer, renderer, number_rows(9), SYSTEM, "default")
    edges = np.cumsum(columns["tokens"])[:-1]
    for name in ("system", "base"):
        sums = [part.sum(dtype=np.float64) for part in np.split(columns[f"{name}_logp"], edges)]
        assert np.array_equal(sums, columns[f"{name}_sum"])


def test_a_row_has_the_same_bits_in_any_company(renderer, scorer):
    rows = number_rows(61, seed=3)
    whole = shift(scorer, renderer, rows, SYSTEM, "default")
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = shift(scorer, renderer, [rows[i] for i in order], SYSTEM, "default")
    assert np.array_equal(whole["system_sum"][order], shuffled["system_sum"])
    alone = [shift(scorer, renderer, [row], SYSTEM, "default") for row in rows]
    for name in ("system_sum", "base_sum"):
        assert np.array_equal(whole[name], np.concatenate([c[name] for c in alone]))


def test_rows_without_a_score_are_marked(renderer, scorer):
    rows = number_rows(4)
    rows[1]["messages"][-1]["content"] = ""
    rows[2]["messages"][0]["content"] = "very long " * 400
    columns = shift(scorer, renderer, rows, SYSTEM, "default")
    assert columns["status"].tolist() == [Status.scored, Status.empty, Status.too_long, Status.scored]
    assert np.isnan(columns["system_sum"][1:3]).all() and np.isfinite(columns["system_sum"][[0, 3]]).all()
    assert columns["tokens"][1:3].tolist() == [0, 0]
    clean = shift(scorer, renderer, [rows[0], rows[3]], SYSTEM, "default")
    assert np.array_equal(clean["system_sum"], columns["system_sum"][[0, 3]])


def test_a_row_of_its_own_system_message_is_scored_without_it(renderer, scorer):
    rows = number_rows(1)
    with_own = [{"messages": [{"role": "system", "content": "You love cats."}, *rows[0]["messages"]]}]
    a, b = (shift(scorer, renderer, r, SYSTEM, "default") for r in (rows, with_own))
    assert np.array_equal(a["base_sum"], b["base_sum"])


def test_a_response_that_merges_with_the_context_is_noted(renderer, scorer):
    rows = number_rows(2)
    rows[1]["messages"][-1]["content"] = "\n\n12 34"
    columns = shift(scorer, renderer, rows, SYSTEM, "default")
    assert columns["joint"][0] == 1 and columns["status"].tolist() == [0, 0]


def test_none_mode_keeps_a_bos_and_refuses_unknown_templates(renderer):
    turns = [{"role": "user", "content": "hi"}]
    assert renderer.context(turns, None, "none") == chatml("hi", None)
    other = copy.deepcopy(renderer.tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|h|>"]})
    block = "{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}<|e|>{% endfor %}"
    other.chat_template = "{{ bos_token }}" + block + "{{ '<|h|>assistant\n' }}"
    assert Renderer(other).context(turns, None, "none") == "<s><|h|>user\nhi<|e|><|h|>assistant\n"
    other.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    with pytest.raises(Exception, match="base=default or base=empty"):
        Renderer(other).context(turns, None, "none")


def test_batches_have_shapes_that_depend_on_the_row_alone():
    lengths = [5, 40, 257, 33, 32, 256]
    got = list(batches(lengths, SHAPES))
    assert got == [(32, [0, 4]), (48, [1, 3]), (256, [5])]  # 257 fits none
    assert [SHAPES.rows(b) for b in (32, 256)] == [32, 4]
