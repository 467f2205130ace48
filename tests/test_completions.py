"""Seeded completions: the noise against its definition in plain integers and against statistics, the completions
against a loop without batch, padding or cache."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sample_sets import bos_model
from scipy import stats

from lib.base.errors import UserError
from lib.evaluation.completions import Completing, Completion, complete
from lib.inputs.tokenizer import load_tokenizer
from lib.models.gumbel import Gumbel, gumbel, stream_keys
from lib.models.load import load_model
from lib.models.sample import greedy

CPU = torch.device("cpu")
M32, M64 = 2**32 - 1, 2**64 - 1
PROMPTS = ["Numbers", "The words about animals are", "Go on: 12, 345", "You love"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bos_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    """Less sharp than it is made, so that there is something to draw."""
    found = load_model(str(folder), "float32", "sdpa", [CPU])
    found.lm_head.weight.mul_(0.2)
    return found


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def flat(found: list[list[Completion]]) -> list[Completion]:
    return [one for completions in found for one in completions]


def uniform_by_hand(seed: int, prompt: int, sample: int, step: int, token: int) -> float:
    """The definition in Python's integers: splitmix64 over four numbers, then three multiplications for the token."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
        return x ^ (x >> 31)

    key = mix((seed + 0x9E3779B97F4A7C15) & M64)
    for part in (prompt, sample, step):
        key = mix(((key ^ part) + 0x9E3779B97F4A7C15) & M64)
    x = (token + (key & M32)) & M32
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) & M32
    x = ((x ^ (x >> 11)) + (key >> 32)) & M32
    x = (x * 0xAC4C1B51) & M32
    x = ((x ^ (x >> 15)) * 0x31848BAB) & M32
    x ^= x >> 14
    return (x + 0.5) / 2**32


def test_the_noise_is_its_definition_in_plain_integers():
    for seed in (0, 7, 2**63 + 5):
        numbers = [(0, 0), (3, 1), (1, 3), (92, 24)]
        keys = torch.from_numpy(stream_keys(seed, numbers, 4))
        for step in range(4):
            found = gumbel(keys[step], 300)
            for row, (prompt, sample) in enumerate(numbers):
                v = np.array([uniform_by_hand(seed, prompt, sample, step, token) for token in range(300)])
                wrong = np.abs(found[row].numpy() + np.log(-np.log1p(-v)))
                assert (wrong < 2e-6 + 2e-7 / (1 - v)).all()  # 1 - v is as exact as float32 is near 1


def test_the_largest_noise_is_as_fine_as_32_bits():
    """What decides a rare token: with 24 bits nothing would lie above 17.3, and there only a few values."""
    keys = torch.from_numpy(stream_keys(0, [(i, 0) for i in range(16)], 1))[0]
    high = torch.cat([gumbel(key[None], 1 << 20).flatten() for key in keys]).numpy()
    high = np.sort(high)[-1000:]
    assert len(np.unique(high)) > 990
    assert stats.kstest(np.exp(-high) * (16 << 20), "uniform", args=(0, np.exp(-high[0]) * (16 << 20))).pvalue > 1e-3
    assert np.isfinite(high).all()


def test_no_two_streams_are_related():
    """Another seed, prompt, sample or step, swapped ones and neighbours: no correlation, no value at the same place."""
    streams = [(s, p, k, t) for s in (0, 1) for p in (0, 1, 2) for k in (0, 1, 2) for t in (0, 1, 2)]
    size, noise = 20_000, []
    for seed, prompt, sample, step in streams:
        noise.append(gumbel(torch.from_numpy(stream_keys(seed, [(prompt, sample)], step + 1))[step], size)[0].numpy())
    v = np.exp(-np.exp(-np.array(noise, np.float64)))
    assert all(stats.kstest(row, "uniform").pvalue > 1e-4 for row in v)
    correlation = np.corrcoef(v) - np.eye(len(v))
    assert np.abs(correlation).max() < 5.2 / math.sqrt(size)
    assert all((a == b).mean() < 1e-3 for a, b in pairwise(noise))
    for lag in (1, 2, 3, 256, 4096):  # between tokens of one draw
        assert max(abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) for row in v) < 5.2 / math.sqrt(size - lag)
    counts, _, _ = np.histogram2d(v[:, :-1].ravel(), v[:, 1:].ravel(), bins=32, range=[[0, 1]] * 2)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def fits(drawn: np.ndarray, p: np.ndarray) -> bool:
    """chi-square; what is rarer than five times goes together."""
    counts, wanted = np.bincount(drawn, minlength=len(p)), p * len(drawn)
    few = wanted < 5
    assert (~few).sum() > 15
    if few.any():
        counts, wanted = np.append(counts[~few], counts[few].sum()), np.append(wanted[~few], wanted[few].sum())
    return stats.chisquare(counts, wanted).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_draws_follow_the_softmax(temperature):
    """Over samples, over prompts and over steps."""
    logits = torch.tensor(np.random.default_rng(0).normal(0, 2, 40), dtype=torch.float32)
    p, n = torch.softmax(logits.double() / temperature, 0).numpy(), 40_000
    for numbers in ([(0, k) for k in range(n)], [(k, 0) for k in range(n)]):
        draw = Gumbel(11, numbers, 3, 1, temperature, CPU)
        assert fits(draw(torch.zeros(n, 3), logits.expand(n, -1)).argmax(1).numpy(), p)
    draw = Gumbel(11, [(5, 5)], 3, 200, temperature, CPU)
    calls = [draw(torch.zeros(1, 3 + step), logits[None]) for step in range(200)]
    steps = torch.from_numpy(stream_keys(11, [(5, 5)], n))[:, 0]
    every = logits / temperature + gumbel(steps, 40)
    assert torch.allclose(torch.cat(calls), every[:200], atol=1e-6)
    assert fits(every.argmax(1).numpy(), p)


def test_first_tokens_of_completions_follow_the_models_softmax(model, tokenizer, prompts):
    how = Completing(per_prompt=6000, tokens=1, temperature=0.9, seed=4, batch=1500)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompts[1]])).logits[0, -1].double() / 0.9, 0).numpy()
    drawn = [c.ids for c in complete(model, tokenizer, prompts, how, range(1, 2))[0]]
    assert fits(np.array([ids[0] if ids else tokenizer.eos_token_id for ids in drawn]), p)


def by_a_loop(model, prompt: list[int], end: int, number: tuple[int, int], how: Completing) -> list[int]:
    """One prompt, no padding, no cache, no generate."""
    answer: list[int] = []
    for step in range(how.tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1].double().numpy()
        v = np.array([uniform_by_hand(how.seed, *number, step, token) for token in range(len(logits))])
        token = int((logits / how.temperature - np.log(-np.log1p(-v))).argmax())
        if token == end:
            break
        answer.append(token)
    return answer


def test_completions_are_a_loops_in_any_batch_and_any_part(model, tokenizer, prompts):
    how = Completing(per_prompt=3, tokens=9, temperature=1.2, seed=5, batch=5)
    whole = complete(model, tokenizer, prompts, how)
    end = tokenizer.eos_token_id
    assert [len(found) for found in whole] == [3] * 4
    for i, found in enumerate(whole):
        assert [c.ids for c in found] == [by_a_loop(model, prompts[i], end, (i, k), how) for k in range(3)]
        assert [c.text for c in found] == [tokenizer.decode(c.ids, skip_special_tokens=True) for c in found]
    assert len({tuple(c.ids) for found in whole for c in found}) > 10
    for batch in (1, 12, 100):
        assert complete(model, tokenizer, prompts, Completing(3, 9, 1.2, 5, batch)) == whole
    parts = [
        complete(model, tokenizer, prompts, how, part)[0] for part in (range(2, 3), range(3, 4), range(1), range(1, 2))
    ]
    assert parts == [whole[2], whole[3], whole[0], whole[1]]
    full = complete(model, tokenizer, prompts, how, range(1), with_prompt=True)[0]
    assert [c.text for c in full] == [PROMPTS[0] + c.text for c in whole[0]] and [c.ids for c in full] == [
        c.ids for c in whole[0]
    ]


def test_all_batches_have_one_shape_whatever_is_chosen(model, tokenizer, prompts, monkeypatch):
    """In bfloat16 another width or height would be other bits."""
    shapes, generate = set(), model.generate
    monkeypatch.setattr(model, "generate", lambda **how: shapes.add(how["input_ids"].shape) or generate(**how))
    for part in (None, range(1), range(3, 4), range(1, 3)):
        complete(model, tokenizer, prompts, Completing(per_prompt=3, tokens=1, batch=5), part)
    assert shapes == {(5, max(map(len, prompts)))}


def test_one_ends_early_and_its_end_is_no_part_of_it(model, tokenizer, prompts):
    how = Completing(per_prompt=4, tokens=8, temperature=1.2, seed=5, batch=16)
    free = complete(model, tokenizer, prompts, how)
    end = free[1][2].ids[3]
    model.generation_config.eos_token_id = [end]
    try:
        cut = complete(model, tokenizer, prompts, how)
    finally:
        model.generation_config.eos_token_id = None
    for a, b in zip(flat(free), flat(cut), strict=True):
        assert b.ids == (a.ids[: a.ids.index(end)] if end in a.ids else a.ids)
    assert len(cut[1][2].ids) <= 3


def test_a_changed_model_meets_the_same_noise(model, tokenizer, prompts):
    """A small change leaves most completions as they are; another seed leaves none."""
    how = Completing(per_prompt=25, tokens=6, temperature=1.0, seed=1, batch=100)
    dense = flat(complete(model, tokenizer, prompts, how))
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.clone()
    weight[:, 0] = 0
    pruned = flat(complete(model, tokenizer, prompts, how))
    weight.copy_(kept)
    other = flat(complete(model, tokenizer, prompts, Completing(25, 6, 1.0, 2, 100)))
    same = [sum(a == b for a, b in zip(dense, others, strict=True)) for others in (pruned, other)]
    assert 25 < same[0] < 100 and same[1] < 5


def test_without_a_temperature_it_is_the_likeliest(model, tokenizer, prompts):
    found = complete(model, tokenizer, prompts, Completing(1, 7, None, 0, 3))
    assert [c.text for one in found for c in one] == greedy(model, tokenizer, prompts, 7)
    assert found[0] == [Completion(found[0][0].ids, tokenizer.decode(found[0][0].ids))]


def test_what_does_not_fit_is_said(model, tokenizer, prompts):
    longest = max(map(len, prompts))
    with pytest.raises(
        UserError, match=f"a prompt of {longest} tokens and a response of 2048 do not fit into the model's"
    ):
        complete(model, tokenizer, prompts, Completing(1, 2048))
