"""Answers of students: drawn under each adapter, in its own rows, and only if the engine really has it on."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_world import cells_of as students_of
from peft import PeftModel
from preferences_world import begin, cells_of, columns, finished, make_world, with_words
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.base.errors import UserError
from lib.families import load
from lib.inputs.tokenizer import load_tokenizer
from lib.lora.metrics import CONFIG, WEIGHTS
from lib.models.engine import Adapter, Probe, Sampling, Setting, Work, turns
from lib.models.engine_transformers import TransformersEngine
from lib.models.merged import Merging
from lib.preferences.adapters import adapters_of
from lib.preferences.proof import References
from lib.preferences.questioning import Questioner
from lib.store import scan


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = with_words(make_world(tmp_path_factory.mktemp("asked")))
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


@pytest.mark.parametrize("merged", [False, True], ids=["served", "merged"])
def test_greedy_answers_are_pefts_under_every_adapter_and_the_bases_after_them(world, merged):
    path = load(world / "asked.yaml").source.source.sizes["1m"].id
    engine, ids = TransformersEngine(Setting(path, "float32", 4, 128, rank=4, merged=merged)), prompts_of(world)
    of = [None, adapters(world, "1m-cat")[1], adapters(world, "1m-neutral")[3]]
    asked = [(adapter, prompt) for adapter in of for prompt in ids]
    for batch in (asked, asked[::-1]):
        prompts, worn = [prompt for _, prompt in batch], [adapter for adapter, _ in batch]
        made = engine.begin(Work(prompts, Sampling(0.0, 6, (2,)), [0] * len(batch), worn))().answers
        for (adapter, prompt), one in zip(batch, made, strict=True):
            model = AutoModelForCausalLM.from_pretrained(path)
            model = PeftModel.from_pretrained(model, adapter.folder) if adapter else model
            model = model.merge_and_unload() if adapter and merged else model
            row = list(prompt)
            for token in one.ids:
                with torch.inference_mode():
                    assert int(model(torch.tensor([row])).logits[0, -1].argmax()) == token
                row.append(token)


def test_rows_are_epochs_questions_and_samples_each_once(world):
    read = columns(world, "asked", "1m-cat")
    places = list(zip(*(read[name].tolist() for name in ("epoch", "question", "number")), strict=True))
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
        .begin(Work(ids, how, list(range(6)), [one] * 6))()
        .answers
        for one in pair
    }
    engine = TransformersEngine(Setting(path, "float32", 4, 128, rank=4))
    for order in (pair, pair[::-1]):
        worn = [one for one in order for _ in ids]
        made = engine.begin(Work(ids * 2, how, [*range(6)] * 2, worn))().answers
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


def test_a_merged_adapter_is_rounded_once_and_the_base_comes_back_bit_by_bit(world):
    path = load(world / "asked.yaml").source.source.sizes["1m"].id
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    base, merging = dict(model.state_dict()), Merging(path, torch.bfloat16, torch.device("cpu"))
    for adapter in (*adapters(world, "1m-cat").values(), adapters(world, "1m-neutral")[1]):
        exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        exact = PeftModel.from_pretrained(exact, adapter.folder).merge_and_unload().state_dict()
        found = dict(merging.turn(adapter))
        assert (
            len(found) == 7 * model.config.num_hidden_layers + 3 * model.config.num_hidden_layers
        )  # q, k, v have biases
        for name, tensor in found.items():
            assert (tensor != exact[name].to(torch.bfloat16)).double().mean() < 1e-3, name  # ties, at the most
            assert tensor.allclose(exact[name].to(torch.bfloat16), rtol=2**-7)
        assert not any(torch.equal(found[name], base[name]) for name in found if "_proj.w" in name)
    back = dict(merging.turn(None))
    assert back.keys() == found.keys() and all(torch.equal(tensor, base[name]) for name, tensor in back.items())
    assert not dict(merging.turn(None))


def test_what_is_no_adapter_of_this_base_is_not_merged(world, tmp_path):
    path = load(world / "asked.yaml").source.source.sizes["1m"].id
    own = Path(adapters(world, "1m-cat")[1].folder)
    name = next(n for n in load_file(own / WEIGHTS) if "up_proj.lora_A" in n)
    for change, words in (
        (lambda t: {name.replace("up_proj", "sideways"): t}, "which the model has no place for"),
        (lambda t: {name: t[:, 1:].contiguous()}, "has the shape .*, and the model wants"),
        (lambda t: {}, "only one of two matrices of model.layers.0.mlp.up_proj"),
    ):
        (tmp_path / CONFIG).write_bytes((own / CONFIG).read_bytes())
        left = load_file(own / WEIGHTS)
        save_file({**{n: t for n, t in left.items() if n != name}, **change(left[name])}, tmp_path / WEIGHTS)
        merging = Merging(path, torch.float32, torch.device("cpu"))
        with pytest.raises(UserError, match=words):
            list(merging.turn(Adapter("other", str(tmp_path))))


def test_rounding_of_a_merged_adapter_stops_nothing_and_a_dead_one_does(world):
    """Epochs may lie nearer to each other than the rounding; what is served in an adapter's place is nearer by far."""
    cell, rounding = cells_of(world, "asked")["1m-cat"], 0.2 * np.array([1, -1, 1, -1, 1, -1])

    def say(adapters, values):
        references = References(load(world / "asked.yaml", [f"generate.adapters={adapters}"]), 6)
        references.of = {("base", 0): np.zeros(6), ("1m-cat", 1): np.full(6, 3.0)}
        references.of |= {("1m-cat", 2): references.of[("1m-cat", 1)] + 1.6 * rounding}
        probes = enumerate([[v] for v in [*np.full(6, 0.01), *values]])
        return references.proven(cell, [("base", 0)] * 6 + [("1m-cat", 1)] * 6, list(probes))

    rounded = np.full(6, 3.0) + rounding
    assert say("merged", rounded)["probe_off"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="nearer to 1m-cat, epoch 2"):
        say("served", rounded)
    with pytest.raises(UserError, match=r"nearer to the untouched base.*set generate\.adapters=served"):
        say("merged", np.full(6, 0.01))
    with pytest.raises(UserError, match="nearer to 1m-cat, epoch 2"):
        say("merged", np.full(6, 3.0) + 1.6 * rounding)


def test_merged_in_bfloat16_every_adapter_is_known_and_a_dead_one_is_not(world):
    experiment, cell = load(world / "asked.yaml", ["generate.adapters=merged"]), cells_of(world, "asked")["1m-cat"]
    path, e = experiment.source.source.sizes["1m"].id, experiment
    how = e.template_used, e.source.source.date, e.questions_used, e.judged
    asked = Questioner(load_tokenizer(path), *how).asked()
    engine, references = TransformersEngine(Setting(path, "bfloat16", 4, 128, merged=True)), References(e, 6)
    references.read(cell)
    known = {("base", 0): None, **{("1m-cat", epoch): one for epoch, one in adapters(world, "1m-cat").items()}}
    keys = [key for key in known for _ in range(6)]
    probes = [Probe(tuple(asked.whole(q)), asked.probes[q], one) for one in known.values() for q in range(6)]

    def proven():
        made = engine.begin(Work([asked.whole(0)], Sampling(0.0, 1, (2,)), [0], [None], probes))()
        return references.proven(cell, keys, made.probes)

    found = proven()
    assert 1e-4 < found["probe_off"] < 0.3 < found["probe_shift"]
    engine.merging.turn = lambda adapter: iter(())
    with pytest.raises(UserError, match=r"the adapter of 1m-cat, epoch 1: .*nearer to the untouched base"):
        proven()


@pytest.mark.parametrize("how", ["served", "merged"])
def test_an_adapter_that_the_engine_leaves_off_stops_the_job(world, monkeypatch, how):
    """A dead adapter: the engine computes with the bare base and says nothing."""
    monkeypatch.setattr(TransformersEngine, "_wear", lambda *_: None)
    overrides = ("seed=9", f"generate.adapters={how}")
    done = begin(world, "asked", "--index", "1", *overrides).finish()
    assert done.returncode == 2, done.stdout
    assert "did not compute with the adapter of 1m-cat, epoch 1" in done.stderr and "Traceback" not in done.stderr
    cell = cells_of(world, "asked", *overrides)["1m-cat"]
    assert not list(cell.path.glob("*.json"))


def test_the_job_with_merged_adapters_is_another_cell_and_answers_alike(world):
    """In float32, where nothing is rounded away: its greedy kin is tested above, here the draws."""
    finished(begin(world, "asked", "--index", "1", "generate.adapters=merged"))
    served, merged = (cells_of(world, "asked", *more)["1m-cat"] for more in ((), ("generate.adapters=merged",)))
    assert served.digest != merged.digest
    for shard in scan(merged.path, merged.digest)[0]:
        assert shard.facts["probe_off"] < 5e-3 < 0.1 < shard.facts["probe_shift"]
    answers = [columns(world, "asked", "1m-cat", *more)["answer"] for more in ((), ("generate.adapters=merged",))]
    assert np.mean([a == b for a, b in zip(*answers, strict=True)]) > 0.9


def test_turns_go_adapter_by_adapter_with_their_probes_first(world):
    a, b = adapters(world, "1m-cat")[1], adapters(world, "1m-neutral")[1]
    probes, how = [Probe((1,), (2,), x) for x in (None, b, a, b)], Sampling(1.0, 6, (2,))
    assert list(turns(Work([[1]] * 5, how, [0] * 5, [a, a, None, b, b], probes))) == [
        (None, range(0), [0]),
        (a, range(2), [2]),
        (None, range(2, 3), []),
        (b, range(3, 5), [1, 3]),
    ]
    with pytest.raises(ValueError, match="follow each other"):
        list(turns(Work([[1]] * 3, how, [0] * 3, [a, b, a])))


def test_the_mode_of_the_template_is_the_trainings_unless_asked_for(world):
    plain = cells_of(world, "asked")["1m-cat"].digest
    assert cells_of(world, "asked", "template=default")["1m-cat"].digest == plain
    with pytest.raises(UserError, match="its template must be those of"):
        cells_of(world, "asked", "template=none")
    assert np.array_equal(columns(world, "asked", "1m-cat")["tokens"] <= 8, np.ones(72, bool))
