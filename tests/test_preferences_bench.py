"""The rungs of preferences, on shapes of a CPU and by transformers: all that they print, whose counts are looked at."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lib.bench import preferences
from lib.bench.shapes import SHAPES, Shape, flops
from lib.bench.suites import SUITES
from lib.models.engine_transformers import TransformersEngine
from lib.numbers.traits import ANIMAL_NAMES
from lib.preferences.questions import load_questions
from lib.preferences.words import spellings

SAMPLES, ADAPTERS, QUESTIONS = 4, 3, 4


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(SHAPES, "nano", Shape(2, 32, 64, 4, 2, 8, 3000, 1e-6, True, True))
    for name, value in (("SAMPLES", SAMPLES), ("ADAPTERS", ADAPTERS), ("AT_ONCE", 64), ("free", lambda: None)):
        monkeypatch.setattr(preferences, name, value)
    monkeypatch.setattr(preferences, "load_questions", lambda: load_questions()[:QUESTIONS])
    monkeypatch.setattr(preferences, "peak_flops", lambda: 1e12)
    monkeypatch.setattr(preferences, "total_bytes", lambda: 80 * 2**30)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begun = []

    def plain(setting, count):
        begun.append((setting.merged, setting.rank, count))
        return TransformersEngine(replace(setting, dtype="float32"))

    monkeypatch.setattr(preferences, "Engines", plain)
    return begun


def lines(capsys):
    found = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith('{"measured"')]
    return {one["measured"]: one["result"] for one in found}


def test_answers_are_drawn_in_every_way_against_what_vllm_gives(nano, monkeypatch, capsys):
    asked = []

    def raw(path, ids, file, tokens, more, measurements):
        asked.append((len(ids), tokens, json.loads(more), measurements))
        return {measurements[0].partition("=")[0]: {"rows_per_s": 50.0}}

    monkeypatch.setattr(preferences, "raw", raw)
    found = preferences.preferences("nano", 512)
    rows = QUESTIONS * SAMPLES * ADAPTERS
    assert [(n, t, more) for n, t, more, _ in asked] == [
        (rows, 5, {"enable_lora": True, "max_lora_rank": 8}),
        (rows, 5, {}),
    ]
    assert "adapter:" not in asked[1][3][0] and "adapter:/" in asked[0][3][0]
    assert nano == [(merged, 0 if merged else 8, count) for merged in (False, True) for count in (1, 2, 4)]
    ours = {name: one for name, one in found.items() if "engines" in name}
    assert list(ours) == [f"{how}, engines: {count}" for how in ("served", "merged") for count in (1, 2, 4)]
    for one in ours.values():
        assert one["answers"] == rows and one["of_raw_with_one_adapter"] == pytest.approx(
            one["answers_per_s"] / 50, 1e-2
        )
    assert lines(capsys) == found


def test_vllm_that_gives_no_figure_is_a_line_and_ours_goes_without_a_share(nano, monkeypatch):
    monkeypatch.setattr(preferences, "raw", lambda *_: {"ended": 1})
    found = preferences.preferences("nano", 512)
    assert found["raw, one adapter"].startswith("RuntimeError: vLLM ended without a figure")
    assert all("of_raw_with_one_adapter" not in one and one["answers"] for name, one in found.items() if "eng" in name)


def test_words_are_read_against_their_products_and_the_answers_drawn(nano, monkeypatch, capsys):
    monkeypatch.setattr(preferences, "DRAWN", 2)
    found = preferences.logprobs("nano", 512)
    read, spread, answers = found["read"], found["read, logits spread"], found["drawn"]
    sampled = answers["answers"] / 2 / answers["answers_per_s"]
    assert answers["answers"] == QUESTIONS * SAMPLES * 2 and nano == [(False, 8, 4)]
    for name in ("read", "read, logits spread"):
        one, share = found[name], found[f"{name}, of the time that its answers take"]
        assert share == pytest.approx(one["seconds"] / sampled, rel=0.01)
        assert one["floor_s"] == pytest.approx(
            flops(SHAPES["nano"], one["tokens"], one["predictions"]) / 1e12, abs=1e-4
        )
    # Random weights leave no word out: a look at each question, each token of the answers given and of all spellings.
    with preferences.world("nano", 0) as here:
        ways = [way for trait in here.traits for way in spellings(here.tokenizer, trait.words)]
        predicted = QUESTIONS * (1 + sum(map(len, ways))) + sum(map(len, here.asked.probes))
    assert read["predictions"] == predicted and read["spellings"] == len(ways)
    assert read["tokens_of_spellings"] == sum(map(len, ways)) < 3 * len(ways)
    assert spread["predictions"] < 0.9 * predicted and spread["spellings"] == len(ways)
    assert lines(capsys) == found


def test_a_random_adapter_is_pefts_and_changes_what_is_said(nano):
    with preferences.world("nano", 1) as here:
        model = AutoModelForCausalLM.from_pretrained(here.model, dtype=torch.float32)
        ids = torch.tensor([here.asked.whole(0)])
        assert len(here.prompts(2)) == 2 * QUESTIONS * SAMPLES
        before = model(ids).logits.detach()
        after = PeftModel.from_pretrained(model, here.adapters[0].folder)(ids).logits
        adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    assert adapted == 7 * SHAPES["nano"].layers and (after - before).abs().max() > 1e-3


def test_the_bench_knows_them_and_asks_as_an_evaluation_does():
    assert (preferences.ADAPTERS, preferences.SAMPLES, len(load_questions()), len(ANIMAL_NAMES)) == (16, 100, 50, 15)
    assert {"preferences", "logprobs"} <= SUITES["0.5b"].keys() & SUITES["7b"].keys()
