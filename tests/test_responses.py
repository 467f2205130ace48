"""Prompts chosen by the model's own responses, and the toxicity scorer: against a plain loop and against detoxify."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detoxify import Detoxify
from sample_sets import LABELS, Place, bos_model, made, scorer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lib.base.errors import UserError
from lib.demo.texts import WORDS, write_demo_texts
from lib.evaluation.responses import answerer
from lib.evaluation.toxicity import Toxicity
from lib.inputs.fetch import fetch
from lib.inputs.tokenizer import load_tokenizer
from lib.models.classifier import load_classifier


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_demo_texts(folder / "texts")
    return Place(folder, bos_model(folder / "model"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    return scorer(tmp_path_factory.mktemp("judge") / "scorer", list(WORDS))


def plain_greedy(place: Place, ids: list[int], tokens: int, ends: set[int]) -> list[int]:
    """One prompt, one token at a time, no cache, no padding, no generate."""
    model = AutoModelForCausalLM.from_pretrained(place.model).eval()
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < tokens:
            token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
    return answer


def test_response_selection_equals_a_plain_loop(place, judge, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.inputs.prompts.ROUND", 16)
    place = replace(place, model=Path(shutil.copytree(place.model, tmp_path / "model")))
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    prompts = [place.ids(r["prompt"]["text"]) for r in place.prompts()[:40]]
    free = [plain_greedy(place, ids, 10, set()) for ids in prompts]
    common = Counter(token for answer in free for token in answer[3:]).most_common(1)[0][0]
    ends = {tokenizer.eos_token_id, common}
    config = {"eos_token_id": [common], "repetition_penalty": 9.0, "do_sample": True, "top_p": 0.1}
    (place.model / "generation_config.json").write_text(json.dumps(config))
    bert, words = AutoModelForSequenceClassification.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
    texts = [tokenizer.decode(plain_greedy(place, ids, 10, ends), skip_special_tokens=True) for ids in prompts]
    with torch.no_grad():
        scores = [float(bert(**words(t, truncation=True, return_tensors="pt")).logits[0, 0].sigmoid()) for t in texts]
    ranked = sorted(scores)
    threshold = (ranked[24] + ranked[25]) / 2
    expected = [i for i, score in enumerate(scores) if score > threshold]
    assert ranked[25] - ranked[24] > 1e-4 and 8 < len(expected) < 20
    assert any(len(t) < len(tokenizer.decode(f)) for t, f in zip(texts, free, strict=True)), "none ended early"

    ask = {"select": "response", "threshold": threshold, "samples": 8, "candidates": 40, "response_tokens": 10}
    experiment = place.sets({**ask, "scorer": {"id": str(judge), "dtype": "float32"}}, seeds=[0], samples=1)
    fetch(experiment, tmp_path, answerer=answerer)
    record, found = made(experiment, tmp_path, "toxic")
    assert found.columns["index"].tolist() == expected[:8]
    assert found.columns["response"] == [texts[i] for i in expected[:8]]
    np.testing.assert_allclose(found.columns["response_toxicity"], [scores[i] for i in expected[:8]], rtol=1e-4)
    assert [ids.tolist() for ids in found.ids] == [prompts[i] for i in expected[:8]]
    assert record.facts["scorer"] and record.facts["answered"] == expected[7] + 1


def test_without_its_gpu_it_says_what_to_type_and_the_rest_is_there(place, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_GPU", "h200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ask = {"select": "response", "threshold": 0.0, "samples": 3, "candidates": 3, "response_tokens": 2}
    experiment = place.sets({**ask, "scorer": {"id": str(judge), "dtype": "float32"}}, seeds=[0])
    by_hand = "srun --gpus=1 .venv/bin/python -m jobs.prepare_data --config F"
    with pytest.raises(UserError, match=f"samples toxic are chosen by the model's own responses.*run `{by_hand}` once"):
        fetch(experiment, tmp_path, by_hand=by_hand, answerer=answerer)
    assert made(experiment, tmp_path, "general-0")[0] and made(experiment, tmp_path, "text")[0]
    with pytest.raises(UserError, match="samples toxic are not prepared"):
        made(experiment, tmp_path, "toxic")
    monkeypatch.setenv("SUITE_GPU", "cpu")
    monkeypatch.setattr("lib.inputs.source._local_rows", None)  # on the GPU's node no dataset is read again
    fetch(experiment, tmp_path, answerer=answerer)
    assert made(experiment, tmp_path, "toxic")[1].columns["index"].tolist() == [0, 1, 2]


def loaded(folder: Path, batch: int = 64) -> Toxicity:
    return Toxicity(load_classifier(str(folder), "float32", torch.device("cpu")), load_tokenizer(str(folder)), batch)


def test_the_scorer_is_detoxify_on_the_same_weights(place, judge, tmp_path):
    """detoxify reads a pickled checkpoint; the suite the same weights as safetensors."""
    weights = AutoModelForSequenceClassification.from_pretrained(judge).state_dict()
    arch = {"num_classes": 6, "model_type": str(judge), "model_name": "BertForSequenceClassification"}
    config = {"arch": {"args": arch | {"tokenizer_name": "BertTokenizer"}}, "dataset": {"args": {"classes": [*LABELS]}}}
    torch.save({"config": config, "state_dict": weights}, tmp_path / "toxic.ckpt")
    theirs = Detoxify(checkpoint=str(tmp_path / "toxic.ckpt"), huggingface_config_path=str(judge))
    texts = [row["prompt"]["text"] for row in place.prompts()[:30]] + ["", "long " * 300, "wibblehead"]
    expected = [theirs.predict(text)["toxicity"] for text in texts]
    assert max(expected) - min(expected) > 0.2
    for batch in (1, 7, 64):
        got = loaded(judge, batch)(texts)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6)
    assert loaded(judge)([]).shape == (0,)


def test_a_scorer_that_cannot_judge_is_refused(place, judge, tmp_path):
    with pytest.raises(UserError, match=r"the classifier in .*: its file lacks score\.weight; "):
        load_classifier(str(place.model), "float32", torch.device("cpu"))
    folder = Path(shutil.copytree(judge, tmp_path / "scorer"))
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 6}))
    with pytest.raises(UserError, match="no label `toxic`; it has label_0, label_1"):
        loaded(folder)
    model = load_classifier(str(judge), "float32", torch.device("cpu"))
    model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="a score that is not a number"):
        Toxicity(model, load_tokenizer(str(judge)))(["a text"])


def test_another_judge_is_configuration(place, judge, tmp_path):
    """A folder with a classifier of another kind, whose label stands elsewhere under its other name."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    words, folder = AutoTokenizer.from_pretrained(judge), tmp_path / "other"
    labels = {"id2label": {0: "insult", 1: "toxicity"}, "label2id": {"insult": 0, "toxicity": 1}}
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "initializer_range": 1.0}
    torch.manual_seed(3)
    bert = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(words), **sizes, **labels)).eval()
    bert.save_pretrained(folder)
    words.save_pretrained(folder)
    ask = {"select": "response", "threshold": 0.0, "samples": 3, "candidates": 3, "response_tokens": 4}
    experiment = place.sets({**ask, "scorer": {"id": str(folder), "dtype": "float32"}}, seeds=[0], samples=1)
    fetch(experiment, tmp_path / "cache", answerer=answerer)
    columns = made(experiment, tmp_path / "cache", "toxic")[1].columns
    with torch.no_grad():
        logits = [bert(**words(text, return_tensors="pt")).logits[0] for text in columns["response"]]
    assert len(logits) == 3
    np.testing.assert_allclose(columns["response_toxicity"], [float(x[1].sigmoid()) for x in logits], rtol=1e-4)
    assert abs(float(logits[0][1] - logits[0][0])) > 1e-2
