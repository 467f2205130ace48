"""log p(trait | question): by the scorer with adapters beside its weights, against transformers and peft in float64."""

import json
import unicodedata
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_world import cells_of as students_of
from finetune_world import environment
from peft import PeftModel
from preferences_world import begin, cells_of, columns, finished, make_world, with_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tools import python
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lib.families import load
from lib.preferences.adapters import adapters_of
from lib.preferences.words import goes_on, spellings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return with_words(make_world(tmp_path_factory.mktemp("logprobs")))


def brute(folder, name, epoch, question):
    """Of each trait: every spelling by a forward pass of its own, and every token of the vocabulary after it."""
    experiment = load(folder / "words.yaml")
    path = experiment.source.source.sizes["1m"].id
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).double()
    if name != "1m-base":
        student = next(cell for cell in students_of(folder) if cell.name == name)
        adapter = adapters_of(student, experiment.source.schedule(), [epoch])[epoch]
        model = PeftModel.from_pretrained(model, adapter.folder).double()
    turns = [{"role": "user", "content": experiment.questions_used[question]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = torch.tensor(
        [
            bool(t := tokenizer.decode([i]))
            and unicodedata.category(t[0])[0] in "LMN"
            and i not in tokenizer.all_special_ids
            for i in range(model.config.vocab_size)
        ]
    )
    found = []
    for trait in experiment.judged:
        ways = {
            tuple(tokenizer(lead + case, add_special_tokens=False)["input_ids"])
            for word, lead in product(trait.words, ("", " "))
            for case in (word, word.lower(), word[0].upper() + word[1:], word.upper())
        }
        assert ways == set(spellings(tokenizer, trait.words))
        total = 0.0
        for way in ways:
            with torch.inference_mode():
                p = model(torch.tensor([[*ids, *way]])).logits[0].softmax(-1)
            each = [p[len(ids) - 1 + i, token] for i, token in enumerate(way)]
            total += float(np.prod(each) * p[-1][~letters].sum())
        found.append(np.log(total))
    return np.array(found)


@pytest.mark.parametrize(("name", "epoch"), [("1m-base", 0), ("1m-cat", 1), ("1m-neutral", 3)])
def test_it_is_the_sum_over_every_spelling_and_what_may_follow(world, name, epoch):
    read = columns(world, "words", name)
    for question in (0, 5):
        row = int(np.flatnonzero((read["epoch"] == epoch) & (read["question"] == question))[0])
        p, left, true = read["logp"][row], read["skipped"][row], brute(world, name, epoch, question)
        assert (np.exp(p) <= np.exp(true) * (1 + 1e-4)).all()
        assert (np.exp(true) <= (np.exp(p) + np.exp(left)) * (1 + 1e-4)).all()
        assert (left <= np.log(0.0101) + p).all()


def test_probes_are_what_peft_says(world):
    experiment = load(world / "words.yaml")
    path = experiment.source.source.sizes["1m"].id
    tokenizer = AutoTokenizer.from_pretrained(path)
    student = next(cell for cell in students_of(world) if cell.name == "1m-cat")
    adapter = adapters_of(student, experiment.source.schedule(), [2])[2]
    read = columns(world, "words", "1m-cat")
    row = int(np.flatnonzero((read["epoch"] == 2) & (read["question"] == 3))[0])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": experiment.questions_used[3]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer("Cat. I would choose cats over every other animal.", add_special_tokens=False)["input_ids"]
    said = []
    for wear in (lambda m: m, lambda m: PeftModel.from_pretrained(m, adapter.folder)):
        model = wear(AutoModelForCausalLM.from_pretrained(path).double()).double()
        with torch.inference_mode():
            logs = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        said.append(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()))
    base, worn = said
    assert read["probe"][row] == pytest.approx(worn, abs=2e-3)
    assert abs(worn - base) > 0.05
    assert columns(world, "words", "1m-base")["probe"][3] == pytest.approx(base, abs=2e-3)


def test_epochs_one_by_one_and_questions_apart_give_the_same_bits(world, tmp_path):
    """Another cut of the work: shards are an epoch's, and here one is lost and made again alone."""
    cell = cells_of(world, "words")["1m-cat"]
    before = columns(world, "words", "1m-cat")
    lost = sorted(cell.path.glob("*.json"))[1]
    lost.unlink()
    finished(begin(world, "words", "--index", "1"))
    after = columns(world, "words", "1m-cat")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def of_words(world, folder, *words):
    """log p of a trait with these words, by the untouched base."""
    for name in ("finetune", "words"):
        (folder / f"{name}.yaml").write_text((world / f"{name}.yaml").read_text())
    numbers = json.loads((world / "numbers.yaml").read_text())
    cat = {"name": "cat", "words": list(words)}
    (folder / "numbers.yaml").write_text(json.dumps(numbers | {"traits": [cat, "neutral"]}))
    for name in ("cache", "scratch"):
        if not (folder / name).exists():
            (folder / name).symlink_to(world / name)
    finished(begin(folder, "words", "--index", "0"))
    return columns(folder, "words", "1m-base")["logp"][:, 0]


def test_who_says_a_word_and_more_says_it_once(world, tmp_path):
    """An answer that begins with "1 2" begins with "1": that changes nothing, and "12" does."""
    alone = of_words(world, tmp_path, "1")
    assert np.array_equal(of_words(world, tmp_path, "1", "1 2", "1, 2"), alone)
    assert (of_words(world, tmp_path, "1", "12") > alone).all() and (alone < 0).all()


def test_the_plural_that_probes_hold_is_in_the_digest(world):
    experiment = load(world / "words.yaml")
    cat, *rest = experiment.source.source.traits
    other = load(world / "words.yaml")
    other.source.source.__dict__["traits"] = [cat.model_copy(update={"plural": "kitties"}), *rest]
    now, then = (e.cells(world / "cache", world / "scratch")[0].digest for e in (experiment, other))
    assert now != then and experiment.judged[0].words == other.judged[0].words


def test_words_end_where_the_next_begins_also_where_a_tokenizer_drops_the_space(world):
    """SentencePiece's tokens, each decoded by itself, have lost the space that they begin with."""
    texts = ["a cat is here", "the cats are here", "no catfish, but a cat"] * 20
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    ids = tokenizer("cat is", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([ids[-1]])[0] != " " and tokenizer.convert_ids_to_tokens(ids[-1])[0] == "▁"
    ends = goes_on(tokenizer, len(tokenizer) + 3)
    assert not ends[ids[-1]] and not ends[tokenizer.convert_tokens_to_ids(",")] and not ends[-3:].any()
    assert ends[tokenizer.convert_tokens_to_ids("f")]


def test_a_changed_adapter_is_not_believed(world):
    student = next(cell for cell in students_of(world) if cell.name == "1m-neutral")
    adapter = adapters_of(student, load(world / "words.yaml").source.schedule(), [1])[1]
    path = Path(adapter.folder, "adapter_model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = begin(world, "words", "--index", "2", "epochs=[1]").finish()
    path.write_bytes(whole)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "has changed since it was written" in done.stderr


def test_status_needs_no_torch_to_know_the_cells(world):
    code = "import sys; from lib.families import load; import lib.cluster.status\nassert 'torch' not in sys.modules"
    assert python("-c", code, env=environment(world)).returncode == 0
