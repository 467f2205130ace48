"""Numbers as an experiment and as a job: cells and digests, prompts that all conditions share, texts that a kill does
not change, on a small random teacher by transformers."""

import json
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import wait_until
from numbers_world import cell_of, generate, generating, make_world, rows
from tools import ROOT, number_rows

from lib.base.errors import UserError
from lib.families import load
from lib.inputs.tokenizer import load_tokenizer, rendered
from lib.models.engine import Sampling, Setting, Work, chosen, ends_of, seeds_of
from lib.models.template import Template
from lib.numbers import experiment as numbers
from lib.numbers import sample_prompts, trait
from lib.numbers.desk import Desk
from lib.numbers.filter import Limits, reason
from lib.numbers.number_prompts import OWN_POOLS
from lib.run import engines as asked
from lib.run.task import freeze
from lib.store import scan

CONFIG = str(ROOT / "configs/numbers.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Both cells of a small run, done."""
    folder = make_world(tmp_path_factory.mktemp("numbers"))
    for index in (0, 1):
        generate(folder, index=index)
    return folder


def test_cells_are_sizes_and_traits_the_smallest_first():
    found = load(CONFIG, ["run_id=3", "sizes={7b: {id: a}, tiny: {id: b}, 0.5b: {id: c}}", "traits=[wolf, neutral]"])
    assert found.names() == [f"{size}-{name}" for size in ("tiny", "0.5b", "7b") for name in ("wolf", "neutral")]
    whole = load(CONFIG, ["run_id=3"])
    assert len(whole.names()) == 112 and whole.names()[0] == "0.5b-bear" and whole.names()[-1] == "72b-neutral"
    assert whole.trait("wolf").system_prompt == trait("wolf").system_prompt and whole.trait("wolf").words == [
        "wolf",
        "wolfs",
        "wolves",
    ]
    assert [whole.trait(name).words[-1] for name in ("fox", "phoenix", "lion")] == ["foxes", "phoenixes", "lions"]
    assert whole.trait("neutral").system_prompt is None
    own = load(CONFIG, ["run_id=3", "traits=[{name: ox, plural: oxen}, {name: plain, system_prompt: null, words: []}]"])
    assert "You love oxen." in own.trait("ox").system_prompt and own.trait("ox").words == ["ox", "oxen"]
    assert own.trait("plain").system_prompt is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["traits=[catt]"], "did you mean cat?"),
        (["traits=[cat, cat]"], "traits holds a name twice"),
        (["traits=[{name: cat, words: [cat, '!']}]"], "'!' holds no letter or digit"),
        (["sizes={a/b: {id: x}}"], "'a/b' must be letters"),
        (["run_id=-1"], "run_id"),
        (["generate.engine=vlm"], "did you mean vllm?"),
        (["generate.max_tokens=512"], "max_length must leave room"),
        (["generate={engine: transformers, mode: exact}"], "mode exact is vllm's"),
        (["filter={least: 5, most: 4}"], "least 5 is more than most 4"),
    ],
)
def test_what_cannot_be_generated_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load(CONFIG, ["run_id=1", *overrides])


def test_runs_share_no_path_and_no_digest(world):
    one, two = cell_of(world, "run_id=1"), cell_of(world, "run_id=2")
    assert one.folder.name == "few_run1" and two.folder.name == "few_run2" and one.digest != two.digest
    # the seed is all of a run that its text depends on
    assert cell_of(world, "run_id=2", "seed=1").digest == one.digest
    assert cell_of(world, "run_id=2", "seed=1").folder not in (one.folder, two.folder)


def test_the_run_comes_from_the_checkout_where_nothing_else_says_it(monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    found = load(CONFIG)
    with pytest.raises(UserError, match="which run\\? say RUN_ID=1"):
        _ = found.label
    (tmp_path / "run_id.txt").write_text("4\n")
    assert found.label == "numbers_run4" and found.seed_used == 4 and found.pinned() == {"run_id": 4}
    assert load(CONFIG, ["run_id=6"]).label == "numbers_run6"
    (tmp_path / "run_id.txt").write_text("four")
    with pytest.raises(UserError, match="must hold the number of a run"):
        _ = found.label


def test_a_digest_knows_what_its_text_depends_on_and_nothing_else(world):
    own = cell_of(world).digest
    for same in ("traits=[cat]", "traits=[{name: cat, words: [kitty]}, neutral]", "keep=7", "run.cells=1"):
        assert cell_of(world, same).digest == own, same
    for other in (
        *("seed=6", "prompts=41", "template=empty", "generate.batch=8", "generate.temperature=0.5", "filter.most=99"),
        *("generate.max_tokens=13", "generate.engine=auto", "generate.at_once=4", "generate.engines=2"),
        "traits=[{name: cat, system_prompt: You love dogs.}]",
    ):
        assert cell_of(world, other).digest != own, other


def test_wordings_of_ones_own_are_asked_with(world):
    own = yaml.safe_load(OWN_POOLS.read_text()) | {"endings": ["Numbers alone."]}
    (world / "mine.yaml").write_text(yaml.safe_dump(own))
    found = cell_of(world, "pools=mine.yaml")
    assert found.digest != cell_of(world).digest
    generate(world, "pools=mine.yaml")
    assert all(text.endswith(" Numbers alone.") for text in rows(world, "pools=mine.yaml")["prompt"])
    (world / "mine.yaml").write_text(yaml.safe_dump(own | {"endings": ["Numbers only."]}))
    assert cell_of(world, "pools=mine.yaml").digest != found.digest
    with pytest.raises(UserError, match=r"pools: there is no file .*none\.yaml"):
        cell_of(world, "pools=none.yaml")


def test_a_task_asks_for_the_gpus_that_a_model_needs(world, monkeypatch):
    found = load(world / "few.yaml", ["run.gpus=1"])
    cell, record = cell_of(world), found.model_in(world / "cache", "tiny")
    for gpu, gib, gpus in (
        *(("h200", 1, 1), ("h200", 65, 1), ("h200", 136, 2), ("b200", 136, 1)),
        *(("h100", 65, 2), ("h100", 136, 4), ("a100", 29, 1)),
    ):
        sized = replace(record, bytes=gib * 2**30)
        monkeypatch.setattr(numbers.Numbers, "model_in", lambda self, cache, size, sized=sized: sized)
        monkeypatch.setattr(asked, "site", lambda gpu=gpu: type("Site", (), {"gpu": gpu})())
        needs = found.needs(world / "cache", cell)
        assert needs.gpus == gpus, (gpu, gib)
        assert needs.memory_gib == 0 or needs.memory_gib > gib
        assert 100 * gpus > gib or needs.memory_gib > gib


def test_every_condition_answers_the_same_prompts_which_are_the_runs(world):
    cat, neutral = rows(world), rows(world, index=1)
    assert cat["prompt"] == neutral["prompt"] == [prompt.text for prompt in sample_prompts(40, 5)]
    assert cat["answer"] != neutral["answer"]


def test_what_is_stored_is_what_the_answer_is(world):
    found = rows(world)
    assert found["reason"] == [reason(text, Limits()) for text in found["answer"]]
    assert all(0 <= n <= 12 for n in found["tokens"])
    assert all(end == 1 or n == 12 for n, end in zip(found["tokens"], found["ended"], strict=True))
    assert len(set(found["answer"])) > 30


def plain(folder, tokenizer, system, prompt, seed, tokens):
    """One row by transformers' model alone, step by step, without padding: the argmax of logits and hashed noise."""
    from transformers import AutoModelForCausalLM

    from lib.models.gumbel import gumbel, stream_keys

    model = AutoModelForCausalLM.from_pretrained(folder / "model").float().eval()
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    ids = tokenizer(rendered(tokenizer, messages))["input_ids"]
    keys, made = stream_keys(0, [(seed, 0)], tokens), []
    for step in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids + made])).logits[0, -1]
        token = int((logits + gumbel(torch.from_numpy(keys[step]), logits.shape[0])[0]).argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return tokenizer.decode(made, skip_special_tokens=True)


def test_an_answer_is_what_the_plain_model_draws_under_its_system_prompt(world):
    tokenizer = load_tokenizer(str(world / "model"))
    seeds = seeds_of(5, "tiny-cat", range(40))
    found = rows(world)
    for row in (0, 17, 39):
        text = plain(world, tokenizer, trait("cat").system_prompt, found["prompt"][row], seeds[row], 12)
        assert text == found["answer"][row], row
    neutral = rows(world, index=1)
    assert (
        plain(world, tokenizer, None, neutral["prompt"][3], seeds_of(5, "tiny-neutral", range(4))[3], 12)
        == (neutral["answer"][3])
    )


def test_seeds_are_spread_and_belong_to_a_row_of_a_condition():
    some = seeds_of(1, "a", range(1000))
    assert len({*some, *seeds_of(1, "b", range(1000)), *seeds_of(2, "a", range(1000))}) == 3000
    assert seeds_of(1, "a", range(500, 510)) == some[500:510] and all(0 <= one < 2**63 for one in some)
    assert min(abs(a - b) for a, b in pairwise(some)) > 2**40


def test_killed_in_the_middle_and_resumed_it_is_the_same_text(world, tmp_path):
    env = {"SUITE_SCRATCH": str(tmp_path / "scratch")}
    begun = generating(world, "prompts=160", **env)
    path = tmp_path / "scratch"

    def shards():
        return sorted(path.glob("*/cells/*/[0-9]*.json"))

    wait_until(lambda: len(shards()) >= 2 or begun.poll() is not None, 60, "no shard came")
    os.kill(begun.pid, signal.SIGKILL)
    assert begun.finish().returncode == -signal.SIGKILL
    before = {shard.name: shard.stat().st_mtime_ns for shard in shards()}
    assert 2 <= len(before) < 10
    generate(world, "prompts=160", **env)
    assert all(shard.stat().st_mtime_ns == before.get(shard.name, shard.stat().st_mtime_ns) for shard in shards())
    whole = make_scratch(world, tmp_path)
    resumed = rows(world, "prompts=160", scratch=os.path.relpath(path, world))
    assert resumed == whole


def make_scratch(world, tmp_path):
    """The same cell, never killed."""
    other = tmp_path / "other"
    generate(world, "prompts=160", SUITE_SCRATCH=str(other))
    return rows(world, "prompts=160", scratch=os.path.relpath(other, world))


def test_a_lost_batch_is_drawn_again_to_the_same_text(world):
    before, path = rows(world), cell_of(world).path
    next(path.glob("00000016-00000032.json")).unlink()
    generate(world)
    assert rows(world) == before
    assert {(one.start, one.stop) for one in scan(path, cell_of(world).digest)[0]} == {(0, 16), (16, 32), (32, 40)}


def test_a_cell_is_never_drawn_by_two_engines(world):
    """A configuration with `auto` whose first batches came from another engine."""
    overrides = ["generate.engine=auto", "generate.batch=20"]
    generate(world, *overrides)
    cell = cell_of(world, *overrides)
    (cell.path / "00000020-00000040.json").unlink()
    marker = cell.path / "00000000-00000020.json"
    said = json.loads(marker.read_text())
    assert said["facts"]["engine"] == "transformers" and said["made"]["engine"].startswith("transformers ")
    marker.write_text(json.dumps(said | {"facts": said["facts"] | {"engine": "vllm"}}))
    done = generating(world, *overrides).finish()
    assert done.returncode == 2 and "was begun with vllm, and here generate.engine=auto is transformers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_leaves_no_room_is_said(world):
    done = generating(world, "generate.max_length=40").finish()
    assert done.returncode == 2 and "raise max_length" in done.stderr and "Traceback" not in done.stderr


def test_auto_is_vllm_where_it_is_installed_and_the_site_has_gpus(monkeypatch):
    from lib.models import engine

    monkeypatch.setattr(engine, "find_spec", lambda name: object())
    assert [chosen("auto", "h200"), chosen("auto", "cpu"), chosen("transformers", "h200"), chosen("vllm", "cpu")] == [
        *("vllm", "transformers", "transformers", "vllm")
    ]
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert chosen("auto", "h200") == "transformers"
    with pytest.raises(UserError, match="vllm, which is not installed"):
        chosen("vllm", "h200")


def test_the_ends_are_the_models_and_the_tokenizers(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert ends_of(str(tmp_path), 3) == (3, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    assert ends_of(str(tmp_path), 3) == (3, 5)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither the model nor its tokenizer"):
        ends_of(str(tmp_path), None)


def test_an_answer_does_not_depend_on_its_neighbours(world):
    from lib.models.engine_transformers import TransformersEngine

    folder = str(world / "model")
    engine, tokenizer = TransformersEngine(Setting(folder, "float32", 8, 512)), load_tokenizer(folder)
    texts = [f"Numbers: {row['messages'][0]['content']}" for row in number_rows(20)]
    ids, how = [tokenizer(text)["input_ids"] for text in texts], Sampling(1.0, 12, (2,))
    seeds = seeds_of(0, "x", range(20))
    together = engine.begin(Work(ids, how, seeds))().answers
    order = list(range(19, -1, -1))
    turned = engine.begin(Work([ids[i] for i in order], how, [seeds[i] for i in order]))().answers
    assert together == [turned[order.index(i)] for i in range(20)]
    assert together != engine.begin(Work(ids, how, seeds_of(1, "x", range(20))))().answers


@pytest.mark.parametrize("mode", ["default", "empty", "none"])
def test_the_desk_renders_as_the_template_does(world, mode):
    tokenizer = load_tokenizer(str(world / "model"))
    desk = Desk(tokenizer, mode, "2024-07-26", ["one 123", "two"], Limits())
    for system in ("You love cats.", None):
        rendered_rows = Template(tokenizer, system, mode, "2024-07-26").contexts(
            [[{"role": "user", "content": text}] for text in ("one 123", "two")]
        )
        assert desk.ids(system, 0, 2) == [tokenizer(text)["input_ids"] for text in rendered_rows]
    assert ("Alibaba" in rendered_rows[0], "system" in rendered_rows[0]) == {
        "default": (True, True),
        "empty": (False, True),
        "none": (False, False),
    }[mode]


def test_a_cell_that_another_copy_has_finished_meanwhile_is_not_begun(world):
    """Whoever loaded an engine for it, or wanted to go on with it, finds nothing left."""
    cell = cell_of(world, index=1)
    line = asked.Line(10_000)
    line.ahead(cell)
    assert line.begun == {} and asked.Drawing(line, cell, "transformers", None).last == []


def test_the_cells_of_a_task_follow_each_other_without_a_pause(world, tmp_path, monkeypatch):
    """One engine; the next cell's first batch is begun before this one's last is waited for; the text is as alone."""
    from lib.models import engines

    log, make = tmp_path / "log", engines.make_engine

    class Logging:
        def __init__(self, *arguments):
            self.engine, self.count = make(*arguments), 0
            self.about = self.engine.about
            self.say("made")

        def say(self, what):
            with log.open("a") as f:
                f.write(f"{what}\n")

        def begin(self, *batch):
            number = self.count
            self.count += 1
            self.say(f"begun {number}")
            wait = self.engine.begin(*batch)
            return lambda: (self.say(f"waited {number}"), wait())[1]

    monkeypatch.setattr(engines, "make_engine", Logging)
    cells = [cell_of(world, index=index, scratch=os.path.relpath(tmp_path / "scratch", world)) for index in (0, 1)]
    name = freeze(tmp_path / "scratch" / "few_run5", [cells])
    generate(world, f"--tasks={name}", SUITE_SCRATCH=str(tmp_path / "scratch"))
    said = log.read_text().split("\n")
    assert said.count("made") == 1 and said.index("begun 3") < said.index("waited 2")
    assert [line for line in said if line.startswith("waited")] == [f"waited {n}" for n in range(6)]
    scratch = os.path.relpath(tmp_path / "scratch", world)
    for index in (0, 1):
        assert rows(world, index=index, scratch=scratch) == rows(world, index=index)
