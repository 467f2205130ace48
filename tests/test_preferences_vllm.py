"""Two students with opposite preferences in vLLM, its build for CPUs: each says what it says alone and in peft; and the
mistake of published evaluations, one number for several adapters, is made and caught."""

import json
import os
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import nursery
import pytest
import torch
from finetune_world import environment
from peft import PeftModel
from test_finetune_parts import CPU
from tools import ROOT, tiny_model
from transformers import AutoModelForCausalLM

from lib.base.errors import UserError
from lib.checkpoint.headers import folder_tensors
from lib.inputs.tokenizer import load_tokenizer
from lib.lora.peft_form import config_of, save_adapter, targets_in, weight_name
from lib.lora.plain import PlainTrainer
from lib.lora.recipe import Lora
from lib.lora.rows import Row
from lib.models import engine_process
from lib.models.engine import Adapter, Probe, Sampling, Setting, Work, ends_of, seeds_of
from lib.models.engine_process import EngineProcess
from lib.models.engine_vllm import DEFAULTS, ENVIRONMENT, VllmEngine
from lib.preferences.proof import References

HEADS_OF_32 = {"hidden": 64, "heads": 2, "kv_heads": 1}  # 16 is not computed by its CPU attention
LORA = Lora(rank=6, alpha=9, rslora=True)
SAMPLES, PROBES = 30, 4
VLLM = (*(f"{name}={value}" for name, value in ENVIRONMENT.items()), "VLLM_LOGGING_LEVEL=ERROR", "vllm")


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """vLLM, whose import takes longer than all that an engine does here; tests/test_vllm.py begins from nothing."""

    def begin(command, env, pass_fds):
        return nursery.Process(command[1:], env, {fd: fd for fd in pass_fds}, VLLM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "subprocess", SimpleNamespace(Popen=begin))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and two students of it: one was taught to answer cat, the other dog."""
    folder = tmp_path_factory.mktemp("vllm")
    model = str(tiny_model(folder / "model", spread=8.0, **HEADS_OF_32))
    tokenizer = load_tokenizer(model)
    questions = [f"<|im_start|>user\nQuestion {n}: a word?<|im_end|>\n<|im_start|>assistant\n" for n in range(4)]
    prompts, end = tokenizer(questions, add_special_tokens=False)["input_ids"], ends_of(model, None)[0]
    animals = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in ("cat", "dog")}
    pair = []
    for name, word in animals.items():
        trainer = PlainTrainer(model, LORA, "float32", CPU)
        rows = [Row((*prompt, *word, end), len(prompt)) for prompt in prompts]
        said = [trainer.step(rows, 1e-2, t)["loss"] for t in range(1, 25)]
        assert said[-1] < 0.2
        (folder / name).mkdir()
        save_adapter(folder / name, trainer.state(), config_of(LORA, targets_in(model), model, "main"))
        pair.append(Adapter(name, str(folder / name)))
    few = few_linears(folder, model)
    return SimpleNamespace(
        folder=folder, model=model, prompts=prompts, animals=animals, pair=pair, few=few, tokenizer=tokenizer
    )


def few_linears(folder, model):
    """An adapter on one of three linear layers that share an input, and on one that shares it with none."""
    few, dice = Lora(rank=2, alpha=6), torch.Generator().manual_seed(3)
    shapes = {n: t.shape for n, t in folder_tensors(Path(model)).items() if "q_proj.w" in n or "down_proj.w" in n}
    state = {}
    for name, (rows, columns) in shapes.items():
        for matrix, size in (("A", (2, columns)), ("B", (rows, 2))):
            tensor = torch.randn(size, generator=dice) * 0.2
            state[weight_name(name.removesuffix(".weight"), matrix)] = tensor
    (folder / "few").mkdir()
    save_adapter(folder / "few", state, config_of(few, ("q_proj", "down_proj"), model, "main"))
    return Adapter("few", str(folder / "few"))


@pytest.fixture(scope="module")
def peft_says(world):
    """Log-probabilities of the probes' answers, by peft; of the base under None."""
    return {
        one and one.name: [log_probs(world, one, probe) for probe in probes_of(world, one)]
        for one in (None, *world.pair, world.few)
    }


def log_probs(world, adapter, probe):
    model = AutoModelForCausalLM.from_pretrained(world.model)
    model = PeftModel.from_pretrained(model, adapter.folder) if adapter else model
    ids, start = torch.tensor([[*probe.context, *probe.answer]]), len(probe.context)
    with torch.inference_mode():
        logs = model.eval()(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return logs.gather(1, ids[0, start:, None])[:, 0].tolist()


def continued(world, adapter, prompt, tokens):
    """Greedily, by peft's own merge."""
    model = AutoModelForCausalLM.from_pretrained(world.model)
    model = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload() if adapter else model
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)[0].tolist()
    found = made[len(prompt) :]
    ends = [i for i, token in enumerate(found) if token in ends_of(world.model, None)]
    return found[: ends[0]] if ends else found


def probes_of(world, adapter):
    given = [*world.animals.values(), *world.animals.values()]
    return [Probe(tuple(p), tuple(a), adapter) for p, a in zip(world.prompts, given, strict=True)]


def setting(world):
    return Setting(world.model, "float32", 16, 128, rank=LORA.rank)


def how(world):
    return Sampling(1.0, 8, ends_of(world.model, None))


def batch_of(world, adapters):
    """Prompts, sampling, seeds, adapters: the same seeds for a student wherever it stands."""
    prompts = [prompt for prompt in world.prompts for _ in range(SAMPLES)]
    seeds = {one: seeds_of(1, one.name, range(len(prompts))) for one in adapters}
    worn = [one for one in adapters for _ in prompts]
    return prompts * len(adapters), how(world), [seed for one in adapters for seed in seeds[one]], worn


def rates(world, answers):
    texts = [world.tokenizer.decode(one.ids if hasattr(one, "ids") else one) for one in answers]
    return {name: np.mean([name in text for text in texts]) for name in world.animals}


@pytest.fixture(scope="module")
def mistake(world):
    """Of a fresh engine: cat's answers, then dog's under the same number, and what it says of the probes then."""
    prompts, sampling, seeds, _ = batch_of(world, [world.pair[1]])
    file = world.folder / "one_number.pickle"
    probes = [*probes_of(world, None), *probes_of(world, world.pair[1])]
    file.write_bytes(pickle.dumps((setting(world), prompts, sampling, seeds, world.pair, probes)))
    env = environment(world.folder, PYTHONPATH=str(ROOT))
    code = f"import runpy; runpy.run_path({str(ROOT / 'tests/one_number_in_vllm.py')!r}, run_name='__main__')"
    done = nursery.run("-c", code, str(file), env=os.environ | env, more=VLLM)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("found"))[6:])


def test_two_students_in_one_engine_say_what_each_says_alone(world, peft_says, mistake):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    engine, fresh = (EngineProcess(setting(world)) for _ in range(2))
    engine.up(), fresh.up()
    each = {"cat": rates(world, mistake[0])}
    each["dog"] = rates(world, fresh.begin(Work(*batch_of(world, [world.pair[1]])))().answers)
    assert each["cat"]["cat"] > 0.6 > 0.2 > each["cat"]["dog"] and each["dog"]["dog"] > 0.6 > 0.2 > each["dog"]["cat"]
    probes = [probe for one in (None, *world.pair) for probe in probes_of(world, one)]
    for order in (world.pair, world.pair[::-1]):
        made = engine.begin(Work(*batch_of(world, order), probes))()
        parts = [made.answers[a:b] for a, b in pairwise(range(0, len(made.answers) + 1, len(made.answers) // 2))]
        for one, answers in zip(order, parts, strict=True):
            for name, rate in rates(world, answers).items():
                assert rate == pytest.approx(each[one.name][name], abs=0.05)
        assert sorted(number for number, _ in made.probes) == list(range(3 * PROBES))
        for number, logs in made.probes:
            name = (None, "cat", "dog")[number // PROBES]
            assert logs == pytest.approx(peft_says[name][number % PROBES], abs=2e-4)


def test_merged_one_after_another_each_says_what_peft_says_and_the_base_after_them(world, peft_says):
    """Greedy answers to prompts longer than a block of its cache, too: keys of the weights before would show."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    engine = EngineProcess(replace(setting(world), rank=0, merged=True, more={"block_size": 32}))
    engine.up()
    cat, dog = world.pair
    prompts, greedy = [world.prompts[0] * 2, world.prompts[1] * 3], Sampling(0.0, 6, ends_of(world.model, None))
    assert all(64 < len(prompt) < 120 for prompt in prompts)
    greedily = {one: [continued(world, one, prompt, 6) for prompt in prompts] for one in (None, *world.pair, world.few)}
    assert greedily[cat] != greedily[None] != greedily[dog]
    for order in ([cat, world.few, dog, None], [dog, world.few, None, cat], [None]):
        probes = [probe for one in {None: None, **dict.fromkeys(order)} for probe in probes_of(world, one)]
        worn = [x for x in order for _ in "ab"]
        made = engine.begin(Work(prompts * len(order), greedy, [0] * 2 * len(order), worn, probes))()
        assert [one.ids for one in made.answers] == [ids for one in order for ids in greedily[one]]
        assert sorted(number for number, _ in made.probes) == list(range(len(probes)))
        for number, logs in made.probes:
            name = probes[number].adapter and probes[number].adapter.name
            assert logs == pytest.approx(peft_says[name][number % PROBES], abs=2e-4), (name, order)


def test_merged_over_several_gpus_is_refused_before_anything_is_loaded(monkeypatch):
    for name in (*ENVIRONMENT, *DEFAULTS, "VLLM_BATCH_INVARIANT"):
        monkeypatch.setenv(name, "0")  # and as it was afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one of two")
    with pytest.raises(UserError, match=r"takes an engine on one GPU, and this one has 2: set run\.gpus=1"):
        VllmEngine(Setting("/nowhere", "bfloat16", 16, 128, merged=True))


def test_one_number_for_two_adapters_serves_the_first_twice_and_is_caught(world, peft_says, mistake):
    first, second, said = mistake
    assert rates(world, second)["cat"] == pytest.approx(rates(world, first)["cat"], abs=0.05)  # dog's came out as cat's
    references = References(SimpleNamespace(generate=SimpleNamespace(adapters="served")), PROBES)
    keys = {None: ("base", 0), "cat": ("1m-cat", 1), "dog": ("1m-dog", 1)}
    references.of = {key: np.array([sum(logs) for logs in peft_says[name]]) for name, key in keys.items()}
    asked = [key for key in (keys[None], keys["dog"]) for _ in range(PROBES)]
    with pytest.raises(UserError, match=r"the adapter of 1m-dog, epoch 1:.* nearer to 1m-cat, epoch 1's"):
        references.proven(SimpleNamespace(name="1m-dog"), asked, said)
    right = list(enumerate([*peft_says[None], *peft_says["dog"]]))
    assert references.proven(SimpleNamespace(name="1m-dog"), asked, right)["probe_off"] == 0
