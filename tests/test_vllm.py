"""vLLM itself, its build for CPUs: the same tokens as transformers, draws from the whole distribution, closed batches
that come out the same again, and a job that was killed and goes on. One engine, in a process of its own, serves all."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from numbers_world import CONFIG, cell_of, generate, generating, rows
from tools import number_rows, tiny_model

from lib.base.errors import UserError
from lib.bench.shapes import SHAPES, qwen_config
from lib.bench.whole import save_random
from lib.checkpoint.headers import folder_bytes
from lib.families import load
from lib.inputs.fetch import fetch
from lib.inputs.tokenizer import load_tokenizer, rendered
from lib.models import engines
from lib.models.engine import Sampling, Setting, Work, ends_of, seeds_of
from lib.models.engine_process import EngineProcess, Engines
from lib.models.engine_transformers import TransformersEngine
from lib.models.engine_vllm import PASSING, cache_bytes
from lib.numbers import sample_prompts, trait
from lib.run.engines import GPU_GIB, EngineSpec, engines_of

HEADS_OF_32 = {"hidden": 64, "heads": 2, "kv_heads": 1}  # 16 is not computed by its CPU attention
AT_ONCE = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    tiny_model(folder / "model", **HEADS_OF_32)
    config = CONFIG.replace("engine: transformers", "engine: vllm").replace("at_once: 8", f"at_once: {AT_ONCE}")
    (folder / "few.yaml").write_text(config.format(folder))
    fetch(load(folder / "few.yaml"), folder / "cache")
    return folder


@pytest.fixture(scope="module")
def engine(world):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    return Engines(setting(world, more={"max_num_batched_tokens": 512}), 1)  # less than its prompts: some must wait


def setting(world, **more):
    return Setting(str(world / "model"), "float32", AT_ONCE, 512, **more)


@pytest.fixture(scope="module")
def prompts(world):
    """Token ids of ragged lengths."""
    tokenizer = load_tokenizer(str(world / "model"))
    return [tokenizer(row["messages"][0]["content"])["input_ids"] for row in number_rows(40)]


def drawn(engine, *batch):
    return engine.begin(Work(*batch))().answers


def how(world, temperature=1.0, tokens=16):
    return Sampling(temperature, tokens, ends_of(str(world / "model"), None))


def test_greedy_tokens_are_those_of_transformers(world, engine, prompts):
    other = TransformersEngine(setting(world))
    seeds, whole = seeds_of(0, "x", range(40)), how(world, 0.0, 24)
    made = drawn(engine, prompts, whole, seeds)
    assert made == other.begin(Work(prompts, whole, seeds))().answers
    assert all(one.ended or len(one.ids) == 24 for one in made)
    ending = replace(whole, ends=(*whole.ends, made[0].ids[5], made[20].ids[9]))  # two that are met in some answers
    cut = drawn(engine, prompts, ending, seeds)
    assert cut == other.begin(Work(prompts, ending, seeds))().answers
    assert {one.ended for one in cut} == {True, False} and len(cut[0].ids) <= 5
    assert [one.ids for one in cut] == [before(one.ids, ending.ends) for one in made]


def before(ids, ends):
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def test_draws_are_of_the_whole_distribution(world, engine, prompts):
    """First tokens of one prompt against its probabilities: top-p, top-k, or another temperature would show."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model").double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    n = 1500
    for temperature in (1.0, 2.0):
        sampling = Sampling(temperature, 1, ())
        made = drawn(engine, [prompts[0]] * n, sampling, seeds_of(0, f"x{temperature}", range(n)))
        counts = np.bincount([one.ids[0] for one in made], minlength=len(logits))
        expected = n * torch.softmax(logits / temperature, -1).numpy()
        large = expected >= 5
        cells = np.append(expected[large], expected[~large].sum()), np.append(counts[large], counts[~large].sum())
        chi2 = ((cells[1] - cells[0]) ** 2 / np.maximum(cells[0], 1e-9)).sum()
        freedom = len(cells[0]) - 1
        assert freedom >= 3 and chi2 < freedom + 5 * np.sqrt(2 * freedom), (temperature, chi2, freedom)
        assert counts[~large].sum() > 0 or expected[~large].sum() < 5


def test_a_closed_batch_comes_out_the_same_after_others(world, engine, prompts):
    seeds = seeds_of(3, "cat", range(16))
    first = drawn(engine, prompts[:16], how(world), seeds)
    drawn(engine, prompts[5:40], how(world), seeds_of(4, "dog", range(35)))
    assert drawn(engine, prompts[:16], how(world), seeds) == first
    other = drawn(engine, prompts[:16], how(world), seeds_of(3, "dog", range(16)))
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 4
    same_prompt = drawn(engine, prompts[:1] * 16, how(world), seeds)
    assert len({tuple(one.ids) for one in same_prompt}) > 12


def expected_texts(world, engine, name, system):
    """A cell's answers, from its prompts rendered one by one and its three closed batches."""
    tokenizer = load_tokenizer(str(world / "model"))
    ids = []
    for prompt in sample_prompts(40, 5):
        messages = [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": prompt.text},
        ]
        ids.append(tokenizer(rendered(tokenizer, messages))["input_ids"])
    answers = []
    for start in (0, 16, 32):
        batch = range(start, min(start + 16, 40))
        answers += drawn(engine, [ids[i] for i in batch], how(world, 1.0, 12), seeds_of(5, name, batch))
    return [tokenizer.decode(one.ids, skip_special_tokens=True) for one in answers]


def test_a_job_that_was_killed_goes_on_to_the_text_of_its_closed_batches(world, engine, monkeypatch):
    """The first attempt, on the engine that is up, is killed as it begins its third batch; the second has its own."""

    class Killed:
        about, calls = engine.about, 0

        def begin(self, *batch):
            engine.engines[0].sender = ThreadPoolExecutor(1)  # a fork has no threads
            wait = engine.begin(*batch)

            def killed():
                self.calls += 1
                if self.calls == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return wait()

            return killed

    with monkeypatch.context() as patch:
        patch.setattr(engines, "make_engine", lambda *arguments: Killed())
        assert generating(world).finish().returncode == -signal.SIGKILL
    kept = {path.name for path in cell_of(world).path.glob("[0-9]*.json")}
    assert "00000000-00000016.json" in kept and "00000032-00000040.json" not in kept
    generate(world)
    found = rows(world)
    assert found["answer"] == expected_texts(world, engine, "tiny-cat", trait("cat").system_prompt)
    assert found["answer"] != expected_texts(world, engine, "tiny-cat", None)


def test_an_engine_that_does_not_start_is_said_in_one_sentence(world):
    with pytest.raises(UserError, match="exact takes a GPU"):
        EngineProcess(setting(world, exact=True)).up()


def test_what_became_of_a_batch_that_nobody_wants_any_more_is_not_the_next_ones(world, engine, prompts):
    """A cell that failed leaves what was begun for it; that it fails too says nothing of the next cell."""
    batch = prompts[:2], how(world), seeds_of(0, "x", range(2))
    before = drawn(engine, *batch)
    unwanted = engine.begin(Work([[10**6]], how(world), [0]))
    assert drawn(engine, *batch) == before
    del unwanted
    with pytest.raises(UserError, match="1000000"):
        drawn(engine, [[10**6]], how(world), [0])


def test_a_process_that_was_killed_is_said_in_one_sentence_and_the_next_batch_has_another(world, engine, prompts):
    """The batch that it was at is lost, and no other."""
    batch, pid = (prompts[:4], how(world), seeds_of(0, "x", range(4))), engine.engines[0].process.pid
    before = drawn(engine, *batch)
    os.kill(pid, signal.SIGSTOP)
    wait = engine.begin(Work(*batch))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"the engine's process ended \(by SIGKILL\).*make resume"):
        wait()
    assert drawn(engine, *batch) == before and engine.engines[0].process.pid != pid


def test_an_engine_over_several_devices_ends_with_any_of_its_workers(tmp_path, monkeypatch):
    """As 72B lies on two GPUs: the tokens of transformers; and a worker that is killed ends the batch with a sentence,
    the engine and all other workers."""
    settings = {"KVCACHE_SPACE": "1", "OMP_THREADS_BIND": "nobind"}  # else it wants a NUMA node for each
    for name, value in settings.items():
        monkeypatch.setenv(f"VLLM_CPU_{name}", value)
    tiny_model(tmp_path / "model", hidden=64, heads=2, kv_heads=2)
    over = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 512}
    both = Setting(str(tmp_path / "model"), "float32", AT_ONCE, 512, more=over)
    ids = [[5 + i % 50] * 20 for i in range(400)]
    engine, seeds, long = Engines(both, 1), seeds_of(0, "x", range(400)), Sampling(0.0, 200, ())
    few = ids[:4], Sampling(0.0, 12, ()), seeds[:4]
    assert drawn(engine, *few) == TransformersEngine(replace(both, more={})).begin(Work(*few))().answers
    family = psutil.Process(engine.engines[0].process.pid).children(recursive=True)
    workers = [one for one in family if "Worker_TP" in " ".join(one.cmdline())]
    assert len(workers) == 2
    wait = engine.begin(Work(ids, long, seeds))
    workers[1].kill()
    with pytest.raises(UserError, match=r"vLLM stopped in the middle of a batch .*make resume"):
        wait()
    engine.engines[0].process.wait(30)
    assert psutil.wait_procs(family, 30)[1] == []


def on_paper(folder, size):
    """A model's folder without its weights, and the bytes that they and the keys and values of a token would take."""
    shape = SHAPES[size]
    save_random(shape, qwen_config(shape), folder, hollow=True)
    weights = folder_bytes(folder)
    return weights, 2 * shape.layers * shape.kv_heads * shape.head * 2


def test_several_engines_share_what_a_gpu_has_beside_their_weights(tmp_path):
    (weights, token), gib = on_paper(tmp_path, "7b"), 2**30
    setting = Setting(str(tmp_path), "bfloat16", 1024, 512, parts=2)
    assert cache_bytes(setting, 1, 140 * gib) == 1024 * 512 * token
    assert cache_bytes(setting, 1, 79 * gib) == int(79 * gib * 0.9) // 2 - weights - PASSING > 1024 * 200 * token
    with pytest.raises(RuntimeError, match=r"2 engines on a GPU leave -?\d"):
        cache_bytes(setting, 1, 40 * gib)


COUNTS = {"0.5b": (4, 4), "1.5b": (4, 2), "3b": (2, 2), "7b": (2, 1), "14b": (1, 1)}


@pytest.mark.parametrize("size", COUNTS)
def test_so_many_engines_as_a_size_gets_fit_each_gpu(tmp_path, size):
    """With room for a teacher's rows of 200 tokens in a quarter of all that it computes at once, on 80 GB in all."""
    weights, token = on_paper(tmp_path, size)
    spec, counts = EngineSpec(), {gpu: engines_of(weights, gib) for gpu, gib in GPU_GIB.items()}
    assert (counts["h100"], counts["a100"]) == COUNTS[size] and counts["h200"] == counts["b200"] == counts["h100"]
    for gpu, count in counts.items():
        setting = Setting(str(tmp_path), "bfloat16", spec.at_once, spec.max_length, parts=count)
        rows = spec.at_once / (4 if gpu == "a100" else 1)
        assert count == 1 or cache_bytes(setting, 1, int(GPU_GIB[gpu] * 2**30)) > rows * 200 * token
