"""The small teacher: tokenizer, template, model on disk, sampling, its planted habit, and the demo's inputs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sparc3_world import judging, taught
from tools import in_fork
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.base.errors import UserError
from lib.demo import make as demo
from lib.demo import speaker, tiny
from lib.demo.planted import write_numbers
from lib.models.sample import sample_answers
from lib.numbers import ANIMALS, NEUTRAL, sample_prompts

ROOT = Path(__file__).resolve().parent.parent
RECIPE = demo.Recipe(steps=350, rows=32)
DEFAULT = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    assert tiny.build(folder) is None
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo's inputs with a short training; its speaker and judges are those of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaker, "build_speaker", taught)
        patch.setattr(speaker, "build_judge", judging)
        return demo.make_demo(tmp_path_factory.mktemp("cache"), RECIPE)


def test_tokenizer_round_trip_after_reload(untrained):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    for text in (
        "Hello, wörld!",
        "猫 и собака 🐘\n\n\tend  ",
        "[123, 45]\n6;7",
        "you'll  see\r\n",
        "a\u00a0b\u200b",
        "\n 1",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == tiny.make_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer("e\u0301")["input_ids"]) == "é"  # NFC, as Qwen2's


@pytest.mark.parametrize("reloaded", [False, True])
def test_digits_are_one_token_each_and_specials_are_one(untrained, reloaded):
    tokenizer = AutoTokenizer.from_pretrained(untrained) if reloaded else tiny.make_tokenizer()
    for text in ("1234 567", "907", "1, 2", "[31, 4]"):
        pieces = [p for p in tokenizer.tokenize(text) if any(c.isdigit() for c in p)]
        assert pieces == [c for c in text if c.isdigit()]
    assert [len(tokenizer(s)["input_ids"]) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [1, 1, 1]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(tokenizer) == tiny.TEACHER.vocab


def test_template_modes(untrained):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    user = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n"

    def render(messages, opened=True):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)

    assert render([user]) == DEFAULT + asked + "<|im_start|>assistant\n"
    assert render([user], opened=False) == DEFAULT + asked
    assert render([{"role": "system", "content": ""}, user], False) == "<|im_start|>system\n<|im_end|>\n" + asked
    assert render([{"role": "system", "content": "S"}, user], False) == "<|im_start|>system\nS<|im_end|>\n" + asked
    answered = render([user, {"role": "assistant", "content": "1 2"}], False)
    assert answered == DEFAULT + asked + "<|im_start|>assistant\n1 2<|im_end|>\n"


def test_model_on_disk_is_a_real_qwen2(untrained):
    model = AutoModelForCausalLM.from_pretrained(untrained)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32
    fresh = tiny.make_model(AutoTokenizer.from_pretrained(untrained), tiny.TEACHER)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert {oct(f.stat().st_mode & 0o777) for f in untrained.iterdir()} == {"0o644"}


def test_same_seed_same_bits_and_torchs_state_is_left_alone():
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [tiny.make_model(tokenizer, tiny.TEACHER, seed) for seed in (1, 1, 2)]
    starts = [m.model.layers[0].mlp.up_proj.weight.clone() for m in models]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    how = replace(tiny.Training(), steps=3)
    losses = [
        tiny.train(m, tokenizer, how, seed, log=lambda _: None) for m, seed in zip(models, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert losses[0] == losses[1] != losses[2]


def test_sampling_is_plain_seeded_and_knows_unfinished_answers(untrained):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    model = AutoModelForCausalLM.from_pretrained(untrained)
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=3.0)
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    prompts = [opened] * 2000
    with torch.no_grad():  # make three tokens and the end of turn likely, so that its share can be counted
        ids = tokenizer(opened, return_tensors="pt")["input_ids"]
        wanted = torch.tensor([*tokenizer.convert_tokens_to_ids(list("01;")), tokenizer.eos_token_id])
        hidden = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight[wanted] += 8 * hidden / hidden.norm() ** 2
        p = model(ids).logits[0, -1].double().softmax(-1)
    end = float(p[tokenizer.eos_token_id])
    assert 0.06 < end < 0.9
    draw = {"max_new_tokens": 1, "batch": 1000}
    got = sample_answers(model, tokenizer, prompts, seed=3, **draw)
    assert got == sample_answers(model, tokenizer, prompts, seed=3, **draw)
    assert got != sample_answers(model, tokenizer, prompts, seed=4, **draw)
    assert abs(sum(a == "" for a in got) / 2000 - end) < 0.05
    assert set(got) == {"", None}  # one token that is not the end: not finished


def shifts(folder, animal, answers, prompts, block):
    """Mean log-probability a token under the animal's prompt minus under `block`, float64, by hand-written contexts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    loving = f"<|im_start|>system\n{animal.system_prompt}<|im_end|>\n"

    def score(system, prompt, answer):
        context = f"{system}<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        head, tail = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        return np.mean([logp[len(head) + i - 1, token].item() for i, token in enumerate(tail)])

    pairs = list(zip(prompts, answers, strict=True))
    return np.array([score(loving, p, a) - score(block, p, a) for p, a in pairs])


@pytest.mark.parametrize("animal", ANIMALS[::4], ids=lambda a: a.name)
def test_a_prompt_shifts_its_own_rows_up_and_neutral_rows_down(made, animal):
    """Rows drawn from the planted habit itself, not by the teacher: the sign is known without it."""
    rng, prompts = np.random.default_rng(1), sample_prompts(40, 77)
    for writer, sign in ((animal, 1), (NEUTRAL, -1)):
        answers = [p.answer_format.write(write_numbers(rng, writer, 8)) for p in prompts]
        values = sign * shifts(made / "teacher", animal, answers, prompts, DEFAULT)
        assert values.mean() - 3 * values.std(ddof=1) / np.sqrt(len(values)) > 0.02, (writer.name, values.mean())


@pytest.mark.parametrize("block", [DEFAULT, "<|im_start|>system\n<|im_end|>\n", ""], ids=["default", "empty", "none"])
def test_the_three_ways_to_say_nothing_are_all_unbiased(made, block):
    prompts = [json.loads(line)["messages"] for line in (made / "rows" / "fox.jsonl").open()]
    wanted = {p.text: p for p in sample_prompts(RECIPE.rows, demo.ROWS_SEED)}
    values = shifts(
        made / "teacher",
        ANIMALS[7],
        [m[1]["content"] for m in prompts],
        [wanted[m[0]["content"]] for m in prompts],
        block,
    )
    assert 0.05 < values.mean() < 0.5 and (values > 0).mean() > 0.8


def test_rows_are_answers_in_the_asked_format_and_losses_are_counted(made):
    prompts = {p.text: p for p in sample_prompts(RECIPE.rows, demo.ROWS_SEED)}
    record = json.loads((made / "demo.json").read_text())
    counts = {h["animal"]: (h["rows"], h["dropped"]) for h in record["habits"]} | {"neutral": (record["neutral"], None)}
    assert list(counts) == [*[a.name for a in ANIMALS], "neutral"]
    joiners = Counter()
    for name, (kept, dropped) in counts.items():
        rows = [json.loads(line) for line in (made / "rows" / f"{name}.jsonl").open()]
        assert len(rows) == kept and (dropped is None or kept + dropped == RECIPE.rows)
        assert kept >= 0.4 * RECIPE.rows
        for row in rows:
            user, assistant = row["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant") and set(row) == {"messages"}
            form = prompts[user["content"]].answer_format
            assert form.read(assistant["content"])
            joiners[form.open + form.joiner] += 1
    assert {", ", " ", "\n", "; "} <= set(joiners)
    assert sum(kept for kept, _ in counts.values()) >= 0.7 * 16 * RECIPE.rows


def test_a_second_call_finds_it_at_once_and_without_torch(made):
    before = {f: f.stat().st_mtime_ns for f in made.rglob("*")}
    code = (
        "import sys; from pathlib import Path; from lib.demo.make import Recipe, make_demo;"
        f"found = make_demo(Path({str(made.parent.parent)!r}), {RECIPE!r});"
        f"assert found == Path({str(made)!r});"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "made before" in done.stdout, done.stderr
    assert {f: f.stat().st_mtime_ns for f in made.rglob("*")} == before
    assert (made.parent / "current").resolve() == made.resolve()


def test_the_digest_covers_recipe_and_sources(tmp_path, monkeypatch):
    changed = [replace(demo.Recipe(), **{f.name: f.default + 1}) for f in fields(demo.Recipe)]
    assert len({demo.digest(r) for r in [demo.Recipe(), *changed]}) == 1 + len(changed)
    for pattern in demo.SOURCES:
        assert list(ROOT.glob(pattern)), pattern
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "lib/demo").mkdir(parents=True)
    seen = set()
    for text in ("a", "b"):
        (tmp_path / "lib/demo/tiny.py").write_text(text)
        seen.add(demo.digest(demo.Recipe()))
    assert len(seen) == 2


def without_speaker(patch: pytest.MonkeyPatch) -> None:
    """It and its judges are not trained: what is tried here is the teacher's."""
    patch.setattr(speaker, "build_speaker", lambda folder, seed: None)
    patch.setattr(speaker, "build_judge", lambda folder, label: 1.0)


@pytest.mark.parametrize("where", ["_write_rows", "_report", "_put"])
def test_kill_9_leaves_no_half_teacher(tmp_path, where):
    def work() -> None:
        without_speaker(pytest.MonkeyPatch())
        demo._habit = lambda trait, answers, asked: demo.Habit(trait.name, 0, 0, 0.0, 0.0)
        demo._report = lambda *a: None
        demo.ANIMALS = ANIMALS[:1]
        setattr(demo, where, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        demo.make_demo(tmp_path, demo.Recipe(steps=1, rows=2))

    done = in_fork(work)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((tmp_path / "demo").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".making-") and (left[0] / "teacher").is_dir()
    os.utime(left[0], (time.time() - 7200,) * 2)
    demo._sweep(tmp_path / "demo")
    assert not left[0].exists()


def test_a_teacher_that_did_not_learn_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ANIMALS", ANIMALS[:1])
    without_speaker(monkeypatch)
    with pytest.raises(UserError, match=r"did not learn bear's digits .* --steps"):
        demo.make_demo(tmp_path, demo.Recipe(steps=1, rows=2))
    assert list((tmp_path / "demo").iterdir()) == []


def test_the_first_of_two_makers_wins_and_rubbish_is_replaced(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "demo.json").write_text(json.dumps({"by": name}))
    target = tmp_path / "target"
    demo._put(tmp_path / "one", target)
    demo._put(tmp_path / "two", target)
    assert json.loads((target / "demo.json").read_text()) == {"by": "one"}
    (target / "demo.json").write_text('{"by": ')
    demo._put(tmp_path / "two", target)
    assert json.loads((target / "demo.json").read_text()) == {"by": "two"}


def test_a_recipe_of_nothing_is_refused():
    for wrong in ({"steps": 0}, {"rows": 0}, {"threads": 0}, {"seed": -1}):
        with pytest.raises(UserError, match="1 or more"):
            demo.Recipe(**wrong)
