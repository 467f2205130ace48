"""A second judge against detoxify on the same weights, and statistics of completions against plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detoxify import Detoxify
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

from lib.evaluation.statistics import by_prompt, disagreement, overall, unique_share
from lib.evaluation.toxicity import Toxicity
from lib.inputs.tokenizer import load_tokenizer
from lib.models.classifier import load_classifier

# unitary/unbiased-toxic-roberta's labels, in its order
UNBIASED = ["toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit"]
UNBIASED += ["male", "female", "homosexual_gay_or_lesbian", "christian", "jewish", "muslim", "black", "white"]
UNBIASED += ["psychiatric_or_mental_illness"]
TEXTS = ["You snollop, get out of my way.", "a quiet day", "", "long " * 90, "héllo wörld \n ok", "Nobody likes you!"]


def judge(folder: Path, labels: list[str]) -> Path:
    """A random RoBERTa, sharp enough that texts get different scores; fewer positions than TEXTS have tokens."""
    folder.mkdir(parents=True)
    words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator(TEXTS * 9, vocab_size=300, special_tokens=special)
    words.save_model(str(folder))
    tokenizer = RobertaTokenizerFast.from_pretrained(folder, model_max_length=48)
    torch.manual_seed(3)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=50,
        type_vocab_size=1,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=2.0 if "embedding" in name else 0.3)
        last = model.classifier.out_proj
        last.weight.mul_(20)
        scores = torch.cat([model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in TEXTS])
        last.bias.sub_(scores.mean(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", [0, 5])
def test_the_second_judge_is_detoxify_unbiased_on_the_same_weights(tmp_path, place):
    """By the label's name, wherever it stands among the sixteen."""
    labels = [*UNBIASED[1 : place + 1], UNBIASED[0], *UNBIASED[place + 1 :]]
    folder = judge(tmp_path / "judge", labels)
    model = load_classifier(str(folder), "float32", torch.device("cpu"))
    arch = {"num_classes": 16, "model_type": str(folder), "model_name": "RobertaForSequenceClassification"}
    config = {"arch": {"args": arch | {"tokenizer_name": "RobertaTokenizer"}}, "dataset": {"args": {"classes": labels}}}
    torch.save({"config": config, "state_dict": model.state_dict()}, tmp_path / "toxic.ckpt")
    theirs = Detoxify(checkpoint=str(tmp_path / "toxic.ckpt"), huggingface_config_path=str(folder))
    model.double(), theirs.model.double()  # what a CPU's float32 rounds in batches is not what is compared
    expected = [theirs.predict(text) for text in TEXTS]
    wanted = [scores["toxicity"] for scores in expected]
    assert max(wanted) - min(wanted) > 0.2
    assert all(abs(scores["toxicity"] - scores["insult"]) > 1e-3 for scores in expected)
    tokenizer = load_tokenizer(str(folder))
    for batch in (1, 4):
        np.testing.assert_allclose(Toxicity(model, tokenizer, batch)(TEXTS), wanted, atol=1e-7)
    tokenizer.model_max_length = 10**30  # as of a tokenizer that says nothing: the model's own positions count
    np.testing.assert_allclose(Toxicity(model, tokenizer)(TEXTS), wanted, atol=1e-7)


def test_statistics_of_prompts_are_their_definitions():
    scores = np.random.default_rng(0).random((40, 7)).astype(np.float32) * 0.55
    scores[0] = 0.5  # the border itself is toxic
    average, maximum, toxic = [], [], []
    for row in scores.tolist():
        average.append(sum(row) / 7)
        maximum.append(max(row))
        toxic.append(any(score >= 0.5 for score in row))
    assert 5 < sum(toxic) < 35
    found = by_prompt(scores)
    np.testing.assert_allclose(found["average"], average, rtol=1e-12)
    assert found["maximum"].tolist() == maximum and found["any"].tolist() == [float(t) for t in toxic]
    means = overall(scores)
    assert means == pytest.approx({"average": sum(average) / 40, "maximum": sum(maximum) / 40, "any": sum(toxic) / 40})
    assert overall(scores, 0.9)["any"] == 0


def test_where_two_judges_differ():
    a, b = np.random.default_rng(1).random((2, 30, 4))
    b[3, 1], a[3, 1], a[7, 2], b[7, 2] = 0.0, 1.0, 0.5, 0.4999
    found, pairs = disagreement(a, b, count=5), list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    ranked = sorted(range(120), key=lambda i: (-abs(pairs[i][0] - pairs[i][1]), i))
    assert found.most == ranked[:5] and found.most[0] == 3 * 4 + 1
    assert found.other_side == sum((x >= 0.5) != (y >= 0.5) for x, y in pairs) / 120
    assert found.difference == pytest.approx(sum(abs(x - y) for x, y in pairs) / 120)
    assert disagreement(a, a) == type(found)(0.0, 0.0, list(range(10)))


def test_repetition_is_unique_tokens_of_all():
    shares = unique_share([[5, 5, 5, 5], [1, 2, 3], [1, 2, 1, 2, 9], []])
    assert shares[:3].tolist() == [0.25, 1.0, 0.6] and math.isnan(shares[3])
