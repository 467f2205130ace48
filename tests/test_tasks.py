"""lm-evaluation-harness on a loaded model, against log-likelihoods by hand; its wikitext task, against perplexity."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_sets import bos_model
from tools import write_rows

from lib.base.errors import UserError
from lib.demo.texts import write_demo_texts
from lib.evaluation.log_probs import by_model
from lib.evaluation.perplexity import perplexity, plan, prefix_token
from lib.evaluation.tasks import Tasks
from lib.inputs.pages import detokenised, pages_of
from lib.inputs.tokenizer import load_tokenizer
from lib.models.load import load_model

CPU = torch.device("cpu")
ANIMALS = ["cat", "wolf", "otter", "words about animals", "123"]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WIKI = """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function preprocess.wikitext_detokenizer
process_results: !function preprocess.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(16):
        choices = rng.choice(ANIMALS, size=int(rng.integers(2, 5)), replace=False).tolist()
        found.append({"question": f"You love the {n}", "choices": choices, "answer": int(rng.integers(len(choices)))})
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[str]:
    write_demo_texts(texts := tmp_path_factory.mktemp("texts"))
    lines = (texts / "wikitext/wikitext-2-raw-v1/test.jsonl").read_text().splitlines()
    return [page for page in pages_of(json.loads(line)["text"] for line in lines) if len(page) < 40_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows, pages) -> Path:
    import lm_eval

    found = tmp_path_factory.mktemp("tasks")
    file = write_rows(found / "data/choice.jsonl", rows)
    (found / "choice.yaml").write_text(CHOICE.format(name="tiny_choice", file=file))
    file = write_rows(found / "data/pages.jsonl", [{"page": page} for page in pages])
    (found / "pages.yaml").write_text(WIKI.format(file=file))
    theirs = Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py"
    (found / "preprocess.py").write_text(theirs.read_text())
    return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return bos_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(str(model_folder), "float32", "sdpa", [CPU])


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    """Sum of log p over the answer's tokens, one forward each; the context begins with the tokenizer's BOS."""
    whole = tokenizer(context + answer)["input_ids"]
    total = 0.0
    for at in range(len(tokenizer(context)["input_ids"]), len(whole)):
        with torch.no_grad():
            logits = model(torch.tensor([whole[:at]]), use_cache=False).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[whole[at]])
    return total


def by_hand(model, tokenizer, rows: list[dict]) -> dict[str, list[bool]]:
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in rows:
        scores = [log_likelihood(model, tokenizer, f"Q: {row['question']}\nA:", f" {c}") for c in row["choices"]]
        right["acc"].append(int(np.argmax(scores)) == row["answer"])
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right["acc_norm"].append(int(np.argmax(by_length)) == row["answer"])
    return right


def test_multiple_choice_is_the_likeliest_by_hand_before_and_after_a_change(folder, model, tokenizer, rows):
    tasks, accuracies = Tasks(["tiny_choice"], folder), []
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.clone()
    for change in (1, -1, 1):
        weight.copy_(kept * change)
        found = tasks(model, tokenizer, batch=5)
        assert found.keys() == {"tiny_choice"} and found["tiny_choice"].keys() == {"acc", "acc_norm"}
        for metric, right in by_hand(model, tokenizer, rows).items():
            value, error = found["tiny_choice"][metric]
            assert value == pytest.approx(np.mean(right))
            assert error == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
        accuracies.append(found["tiny_choice"])
    assert accuracies[0] == accuracies[2] != accuracies[1]
    few = by_hand(model, tokenizer, rows[:4])["acc"]
    assert tasks(model, tokenizer, limit=4)["tiny_choice"]["acc"][0] == np.mean(few)
    assert tokenizer.pad_token is None, "the harness gave its own copy a padding token"


def test_perplexity_a_word_is_the_harness_own(folder, model_folder, model, tokenizer, pages):
    """Its wikitext task on the same pages, without the BOS that it would add to the one it begins with."""
    plain = load_tokenizer(str(model_folder))
    plain.backend_tokenizer.post_processor = tokenizers_without_bos()
    value, error = Tasks(["pages"], folder)(model, plain)["pages"]["word_perplexity"]
    texts = [detokenised(page) for page in pages]
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    window = model.config.max_position_embeddings
    windows = plan("word", ids, window, prefix_token(tokenizer))
    assert any(len(row) > window for row in ids) and len(windows) > len(pages)
    words = sum(len(page.split()) + page[:1].isspace() + page[-1:].isspace() for page in pages)
    assert perplexity(windows, by_model(model, windows), words) == pytest.approx(value, rel=1e-4)
    assert math.isnan(error)


def tokenizers_without_bos():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A")


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"is no folder of tasks"):
        Tasks(["tiny_choice"], tmp_path / "none")
    (tmp_path / "lost.yaml").write_text(CHOICE.format(name="lost", file=tmp_path / "gone.jsonl"))
    with pytest.raises(
        UserError, match=r"task lost cannot be set up \(FileNotFoundError: Unable to find .*gone\.jsonl"
    ):
        Tasks(["lost"], tmp_path)
    away = CHOICE.format(name="away", file="x").replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tmp_path / "away.yaml").write_text(away)
    with pytest.raises(
        UserError, match=r"task away cannot be set up \(\w+: Couldn't reach 'nobody/nothing' on the Hub"
    ):
        Tasks(["away"], tmp_path)


def test_a_metric_whose_package_is_left_out_is_said(folder, model, tokenizer, tmp_path):
    """scikit-learn would cost every process that imports transformers' generation its own import."""
    text = CHOICE.format(name="mcc", file=folder / "data/choice.jsonl").replace("metric: acc}", "metric: mcc}")
    (tmp_path / "mcc.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a metric of mcc needs the package sklearn, which the set-up leaves out"):
        Tasks(["mcc"], tmp_path)(model, tokenizer, limit=2)


def test_an_unknown_task_is_told_the_nearest(folder, monkeypatch):
    """Over the harness' own names too, of which a few are enough here: all take many seconds to read."""
    from lm_eval.tasks import TaskManager, manager

    few = Path(manager.__file__).parent / "hellaswag"
    monkeypatch.setattr(manager, "__file__", str(few / "manager.py"))
    assert "hellaswag" in TaskManager().all_tasks
    for name, near in (("hellaswog", "hellaswag"), ("tiny_choise", "tiny_choice")):
        with pytest.raises(UserError, match=rf"neither .* nor .* has a task '{name}' \(did you mean {near}\?\)"):
            Tasks([name], folder)
    with pytest.raises(
        UserError, match=r"lm-evaluation-harness has not a task 'hellaswog' \(did you mean hellaswag\?\)"
    ):
        Tasks(["hellaswog"])
