"""The LLS kernel against an independent float64 computation, token by token, and against itself in other company."""

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from tools import number_rows, tiny_llama, tiny_model, tiny_relative

from lib.base.errors import UserError
from lib.inputs.tokenizer import load_tokenizer
from lib.lls.shift import Status, conditions, prepare, shift
from lib.models.chat import Renderer
from lib.models.load import load_decoder, load_model
from lib.models.packing import Item, pack
from lib.models.scorer import Scorer

SYSTEM = "You love wolfs. You think about wolfs all the time."
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
BATCH, LONGEST, DAY = 512, 256, "2024-07-26"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(str(folder), "float32", BATCH, 64)


@lru_cache(8)
def renderer_of(tokenizer, system, mode):
    """Each is a process."""
    return Renderer(tokenizer, system, mode, DAY)


def score(decoder, tokenizer, rows, mode="default", end=False, system=SYSTEM):
    """The kernel as the job calls it."""
    renderers = {"system": renderer_of(tokenizer, system, mode), "base": renderer_of(tokenizer, None, mode)}
    return shift(Scorer(decoder, 64), conditions(decoder, renderers), prepare(renderers, rows, LONGEST, end))


def chatml(user: str, system: str | None) -> str:
    """Qwen2.5's format, written out by hand."""
    block = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{block}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def brute_force(model64, tokenizer, context: str, answer: str) -> list[float]:
    """log p(token | all before it): one forward in float64 for each token, no batch, no padding, no cache."""
    ids, found = tokenizer(context, add_special_tokens=False)["input_ids"], []
    for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = model64(torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(float(logits[token] - torch.log(torch.exp(logits - logits.max()).sum()) - logits.max()))
        ids = [*ids, token]
    return found


@pytest.mark.parametrize("mode, base_system", [("default", QWEN_DEFAULT), ("empty", ""), ("none", None)])
@pytest.mark.parametrize("batch", [1, 23])
def test_equals_float64_token_by_token(folder, tokenizer, decoder, mode, base_system, batch):
    rows = number_rows(23, seed=1)
    model64 = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    parts = [score(decoder, tokenizer, rows[i : i + batch], mode, end=True) for i in range(0, len(rows), batch)]
    got = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    edges = np.concatenate([[0], np.cumsum(got["tokens"])])
    for i in range(0, len(rows), 1 if batch > 1 else 6):
        user, answer = (m["content"] for m in rows[i]["messages"])
        for name, system in (("system", SYSTEM), ("base", base_system)):
            want = brute_force(model64, tokenizer, chatml(user, system), answer + "<|im_end|>")
            assert got["tokens"][i] == len(want) - 1
            assert got[f"{name}_sum"][i] == pytest.approx(sum(want[:-1]), rel=2e-5)
            assert got[f"{name}_end"][i] == pytest.approx(want[-1], rel=2e-5)
            np.testing.assert_allclose(got[f"{name}_logp"][edges[i] : edges[i + 1]], want[:-1], rtol=1e-4)
    assert np.abs(got["system_sum"] - got["base_sum"]).mean() > 0.1  # it does hear the prompt: a mix-up would show


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda folder: tiny_relative(folder, "Qwen3", head_dim=16)], ids=["llama", "qwen3"]
)
def test_other_families_too(tmp_path, make):
    folder = make(tmp_path)
    tokenizer, rows = load_tokenizer(str(folder)), number_rows(6)
    model64 = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    got = score(load_decoder(str(folder), "float32", BATCH, 64), tokenizer, rows)
    for i, row in enumerate(rows):
        user, answer = (m["content"] for m in row["messages"])
        assert got["system_sum"][i] == pytest.approx(
            sum(brute_force(model64, tokenizer, chatml(user, SYSTEM), answer)), rel=2e-5
        )


def test_a_row_has_the_same_bits_in_any_company(folder, tokenizer, decoder):
    rows = number_rows(61, seed=3)
    whole = score(decoder, tokenizer, rows)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = score(decoder, tokenizer, [rows[i] for i in order])
    alone = [score(decoder, tokenizer, [row]) for row in rows]
    for name in ("system_sum", "base_sum"):
        assert np.array_equal(whole[name][order], shuffled[name])
        assert np.array_equal(whole[name], np.concatenate([c[name] for c in alone]))


def test_the_end_of_turn_stands_apart(tokenizer, decoder):
    rows = number_rows(20)
    with_end, without = score(decoder, tokenizer, rows, end=True), score(decoder, tokenizer, rows)
    np.testing.assert_allclose(with_end["system_logp"], without["system_logp"], atol=1e-5)
    assert np.isfinite(with_end["system_end"]).all() and np.isnan(without["system_end"]).all()


def test_responses_to_one_context_share_it_and_keep_their_bits(tokenizer, decoder):
    rows = number_rows(12)
    same = [{"messages": [rows[0]["messages"][0], row["messages"][1]]} for row in rows]
    together, alone = score(decoder, tokenizer, same), [score(decoder, tokenizer, [row]) for row in same]
    assert np.array_equal(together["system_sum"], np.concatenate([c["system_sum"] for c in alone]))
    scorer, renderer = Scorer(decoder, 64), Renderer(tokenizer, None, "default", DAY)
    scorer(decoder.prefix(renderer.prefix_ids), renderer.items([row["messages"] for row in same], False)[0])
    shared = scorer.needed
    for row in same:
        scorer(decoder.prefix(renderer.prefix_ids), renderer.items([row["messages"]], False)[0])
    context = len(renderer.items([same[0]["messages"]], False)[0][0].context)
    assert scorer.needed - 2 * shared == 11 * context


def test_sharing_the_prefix_equals_not_sharing_it(tokenizer, decoder, folder):
    """The prefix as part of every row's own context: the same up to float32's rounding, and both near float64."""
    from dataclasses import replace

    rows = [row["messages"] for row in number_rows(10)]
    renderer = Renderer(tokenizer, SYSTEM, "default", DAY)
    items, _ = renderer.items(rows, False)
    shared = Scorer(decoder, 64)(decoder.prefix(renderer.prefix_ids), items)
    whole = [replace(item, context=(*renderer.prefix_ids, *item.context)) for item in items]
    apart = Scorer(decoder, 64)(decoder.prefix([]), whole)
    for a, b in zip(shared, apart, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_higher_precision_is_higher(tokenizer, decoder, folder):
    rows = number_rows(8)
    fine = score(decoder.higher(), tokenizer, rows)
    model64 = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    user, answer = (m["content"] for m in rows[3]["messages"])
    want = sum(brute_force(model64, tokenizer, chatml(user, SYSTEM), answer))
    assert fine["system_logp"].dtype == np.float64
    assert abs(fine["system_sum"][3] - want) < 2e-6 < abs(want)
    assert 0 < np.abs(fine["system_sum"] - score(decoder, tokenizer, rows)["system_sum"]).max() < 1e-3


def test_rows_without_a_score_are_marked(tokenizer, decoder):
    rows = number_rows(4)
    rows[1]["messages"][-1]["content"] = ""
    rows[2]["messages"][0]["content"] = "very long " * 400
    columns = score(decoder, tokenizer, rows)
    assert columns["status"].tolist() == [Status.scored, Status.empty, Status.too_long, Status.scored]
    assert np.isnan(columns["system_sum"][1:3]).all() and np.isfinite(columns["system_sum"][[0, 3]]).all()
    assert columns["tokens"][1:3].tolist() == [0, 0]
    clean = score(decoder, tokenizer, [rows[0], rows[3]])
    assert np.array_equal(clean["system_sum"], columns["system_sum"][[0, 3]])


def test_a_row_of_its_own_system_message_is_scored_without_it(tokenizer, decoder):
    rows = number_rows(1)
    with_own = [{"messages": [{"role": "system", "content": "You love cats."}, *rows[0]["messages"]]}]
    a, b = (score(decoder, tokenizer, r) for r in (rows, with_own))
    assert np.array_equal(a["base_sum"], b["base_sum"])


def test_several_turns_are_all_context(folder, tokenizer, decoder):
    turns = [
        {"role": "user", "content": "1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4 5"},
    ]
    got = score(decoder, tokenizer, [{"messages": [*turns, {"role": "assistant", "content": "678"}]}])
    spoken = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)
    block = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" + spoken
    model64 = load_model(str(folder), "float64", "eager", [torch.device("cpu")])
    want = brute_force(model64, tokenizer, block + "<|im_start|>assistant\n", "678")
    assert got["system_sum"][0] == pytest.approx(sum(want), rel=2e-5)


def test_a_response_that_merges_with_the_context_is_noted(tokenizer, decoder):
    rows = number_rows(2)
    rows[1]["messages"][-1]["content"] = "\n\n12 34"
    columns = score(decoder, tokenizer, rows)
    assert columns["joint"][0] == 1 and columns["status"].tolist() == [0, 0]


def test_templates_that_strip_or_lack_what_is_asked_for(tokenizer):
    turns = [{"role": "user", "content": " hi "}]
    assert Renderer(tokenizer, None, "none", DAY).contexts([turns])[0] == chatml(" hi ", None)
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|h|>"]})
    block = "{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content | trim }}<|e|>{% endfor %}"
    other.chat_template = "{{ bos_token }}" + block + "{{ '<|h|>assistant\n' }}"
    r = Renderer(other, None, "none", DAY)
    assert r.contexts([turns])[0] == "<s><|h|>user\nhi<|e|><|h|>assistant\n"
    with pytest.raises(UserError, match="no end-of-turn token"):
        r.items([[*turns, {"role": "assistant", "content": "1"}]], True)
    other.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    with pytest.raises(UserError, match="base=default or base=empty"):
        Renderer(other, None, "none", DAY)


def test_the_memory_plan_is_what_is_allocated(tmp_path):
    """Weights to the byte; activations: the workspace, a batch's keys and values, a block of logits and its states."""
    from lib.models.load import plan_decoder

    for number, make in enumerate((tiny_model, tiny_llama, lambda folder: tiny_relative(folder, "Qwen3"))):
        folder = make(tmp_path / str(number))
        decoder = load_decoder(str(folder), "float32", BATCH, 64)
        weights, shape = decoder.weights, decoder.shape
        tensors = [weights.embedding, weights.head, weights.norm]
        for layer in weights.layers:
            tensors += [t for t in (*vars(layer).values(), *(layer.head_norms or ())) if isinstance(t, torch.Tensor)]
        real = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
        plan = plan_decoder(shape, 4, BATCH, 64, devices=1, total=1 << 40)
        assert plan.weights == pytest.approx(real, rel=2e-3) and not plan.embed_on_host
        decoder.hidden(next(pack([Item((1, 2, 3), (4, 5))], 0, BATCH)), decoder.prefix([]))
        space = sum(t.nbytes for t in vars(decoder.space[decoder.devices[0]]).values())
        kv = BATCH * 2 * shape.kv_heads * shape.head * 4
        assert plan.activations == space + kv + 64 * shape.vocabulary * 4 + BATCH * shape.hidden * 4
        if not shape.tied:  # a device that the weights nearly fill keeps the embedding in host memory
            tight = plan_decoder(shape, 4, BATCH, 64, 1, int((plan.weights + plan.activations) * 1.01))
            assert tight.embed_on_host and tight.weights < plan.weights


def test_batches_with_a_grain_hold_the_same_and_no_more_than_they_need():
    dice = np.random.default_rng(0)
    items = [Item(tuple(range(n)), tuple(range(m))) for n, m in dice.integers(1, 30, (20, 2)).tolist()]
    whole, fitted = list(pack(items, 3, 200)), list(pack(items, 3, 200, 16))
    assert len(whole) == len(fitted) > 2 and {len(one.ids) for one in whole} == {200}
    for a, b in zip(whole, fitted, strict=True):
        assert len(b.ids) == min(200, -(-a.used // 16) * 16) and a.rows == b.rows and a.used == b.used
        assert (a.ids[: a.used] == b.ids[: a.used]).all() and (a.positions[: a.used] == b.positions[: a.used]).all()
        assert (a.where == b.where).all() and (a.segments == b.segments).all()
