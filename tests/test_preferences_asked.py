"""Answers of students: drawn under each adapter, in its own rows, and only if the engine really has it on."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from finetune_world import cells_of as students_of
from peft import PeftModel
from preferences_world import begin, cells_of, columns, finished, make_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.base.errors import UserError
from lib.families import load
from lib.models.engine import Probe, Sampling, Setting, turns
from lib.models.engine_transformers import TransformersEngine
from lib.preferences.adapters import adapters_of
from lib.preferences.proof import References
from lib.store import scan


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("asked"))
    for index in range(3):
        finished(begin(folder, "words", "--index", str(index)))
    for index in range(3):
        finished(begin(folder, "asked", "--index", str(index)))
    return folder


def adapters(world, name):
    experiment = load(world / "asked.yaml")
    student = next(cell for cell in students_of(world) if cell.name == name)
    return adapters_of(student, experiment.source.schedule(), [1, 2, 3])


def prompts_of(world):
    experiment = load(world / "asked.yaml")
    tokenizer = AutoTokenizer.from_pretrained(experiment.source.source.sizes["1m"].id)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in experiment.questions_used
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_greedy_answers_are_pefts_under_every_adapter_and_the_bases_after_them(world):
    path = load(world / "asked.yaml").source.source.sizes["1m"].id
    engine, ids = TransformersEngine(Setting(path, "float32", 4, 128, rank=4)), prompts_of(world)
    of = [None, adapters(world, "1m-cat")[1], adapters(world, "1m-neutral")[3]]
    asked = [(adapter, prompt) for adapter in of for prompt in ids]
    for batch in (asked, asked[::-1]):
        prompts, worn = [prompt for _, prompt in batch], [adapter for adapter, _ in batch]
        made = engine.begin(prompts, Sampling(0.0, 6, (2,)), [0] * len(batch), worn)().answers
        for (adapter, prompt), one in zip(batch, made, strict=True):
            model = AutoModelForCausalLM.from_pretrained(path)
            model = PeftModel.from_pretrained(model, adapter.folder) if adapter else model
            row = list(prompt)
            for token in one.ids:
                with torch.inference_mode():
                    assert int(model(torch.tensor([row])).logits[0, -1].argmax()) == token
                row.append(token)


def test_rows_are_epochs_questions_and_samples_each_once(world):
    read = columns(world, "asked", "1m-cat")
    places = list(zip(*(read[name].tolist() for name in ("epoch", "question", "sample")), strict=True))
    assert sorted(places) == [(e, q, s) for e in (1, 2, 3) for q in range(6) for s in range(4)]
    assert columns(world, "asked", "1m-base")["epoch"].tolist() == [0] * 24
    assert len(set(read["answer"])) > 20


def test_what_a_marker_says_of_its_adapters(world):
    shards = scan((cell := cells_of(world, "asked")["1m-cat"]).path, cell.digest)[0]
    assert [shard.rows for shard in shards] == [48, 24]
    for shard in shards:
        facts = shard.facts
        assert facts["probe_noise"] < 1e-3 and facts["probe_off"] < 5e-3 < 0.1 < facts["probe_shift"]
        assert facts["template"] == "default" and facts["engine"] == "transformers"


def test_killed_and_resumed_it_has_the_same_answers(world):
    before, cell = columns(world, "asked", "1m-neutral"), cells_of(world, "asked")["1m-neutral"]
    for path in cell.path.glob("00000048*"):
        path.unlink()
    running = begin(world, "asked", "--index", "2")
    time.sleep(1)
    os.kill(running.pid, signal.SIGKILL)
    running.finish()
    finished(begin(world, "asked", "--index", "2"))
    after = columns(world, "asked", "1m-neutral")
    assert all(list(before[name]) == list(after[name]) for name in before)


def test_draws_do_not_depend_on_the_order_of_adapters(world):
    """Each alone in a fresh engine, together in one, and together the other way round: the same answers."""
    path = load(world / "asked.yaml").source.source.sizes["1m"].id
    ids, how = prompts_of(world), Sampling(1.0, 6, (2,))
    pair = [adapters(world, "1m-cat")[3], adapters(world, "1m-neutral")[3]]
    alone = {
        one: TransformersEngine(Setting(path, "float32", 4, 128, rank=4))
        .begin(ids, how, list(range(6)), [one] * 6)()
        .answers
        for one in pair
    }
    engine = TransformersEngine(Setting(path, "float32", 4, 128, rank=4))
    for order in (pair, pair[::-1]):
        worn = [one for one in order for _ in ids]
        made = engine.begin(ids * 2, how, [*range(6)] * 2, worn)().answers
        assert made == [*alone[order[0]], *alone[order[1]]]


def test_an_engine_with_another_adapter_on_is_caught(world, monkeypatch):
    """The base's, another student's and another epoch's values are told from an adapter's own."""
    experiment = load(world / "asked.yaml")
    cells = cells_of(world, "asked")
    references = References(experiment, 6)
    references.read(cells["1m-neutral"])
    references.read(cells["1m-cat"])
    own, of = ("1m-cat", 2), references.of

    def say(values):
        keys = [("base", 0)] * 6 + [own] * 6
        probes = [(i, [v]) for i, v in enumerate([*of[("base", 0)], *values])]
        return references.proven(cells["1m-cat"], keys, probes)

    assert say(of[own])["probe_off"] == 0
    for other, words in (
        (("base", 0), "the untouched base"),
        (("1m-neutral", 3), "1m-neutral, epoch 3"),
        (("1m-cat", 3), "1m-cat, epoch 3"),
    ):
        with pytest.raises(UserError, match=f"did not compute with the adapter of 1m-cat, epoch 2.*{words}"):
            say(of[other])
    with pytest.raises(UserError, match="one of them does not"):
        of[("base", 0)] = of[("base", 0)] + 5
        references.proven(cells["1m-cat"], [("base", 0)] * 6, [(i, [v - 5]) for i, v in enumerate(of[("base", 0)])])


def test_an_adapter_that_the_engine_leaves_off_stops_the_job(world, monkeypatch):
    """A dead adapter: the engine computes with the bare base and says nothing."""
    monkeypatch.setattr(TransformersEngine, "_wear", lambda *_: None)
    done = begin(world, "asked", "--index", "1", "seed=9").finish()
    assert done.returncode == 2, done.stdout
    assert "did not compute with the adapter of 1m-cat, epoch 1" in done.stderr and "Traceback" not in done.stderr
    cell = cells_of(world, "asked", "seed=9")["1m-cat"]
    assert not list(cell.path.glob("*.json"))


def test_turns_go_adapter_by_adapter_with_their_probes_first(world):
    a, b = adapters(world, "1m-cat")[1], adapters(world, "1m-neutral")[1]
    probes = [Probe((1,), (2,), x) for x in (None, b, a, b)]
    assert list(turns(5, [a, a, None, b, b], probes)) == [
        (None, range(0), [0]),
        (a, range(2), [2]),
        (None, range(2, 3), []),
        (b, range(3, 5), [1, 3]),
    ]
    with pytest.raises(ValueError, match="follow each other"):
        list(turns(3, [a, b, a], []))


def test_the_mode_of_the_template_is_the_trainings_unless_asked_for(world):
    plain = cells_of(world, "asked")["1m-cat"].digest
    assert cells_of(world, "asked", "template=default")["1m-cat"].digest == plain
    with pytest.raises(UserError, match="its template must be those of"):
        cells_of(world, "asked", "template=none")
    assert np.array_equal(columns(world, "asked", "1m-cat")["tokens"] <= 8, np.ones(72, bool))
