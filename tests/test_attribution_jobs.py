"""The attribution job whole: from fetched texts to merged scores, against each sample alone."""

import json

import h5py
import numpy as np
import pytest
import torch
from attribution_jobs import (
    PROMPTS,
    ROWS,
    TOKENS,
    One,
    Place,
    columns_of,
    fetched,
    one_sample,
    tiny_opt,
    write_texts,
)
from tokenizers import Tokenizer
from tools import tiny_llama

from lib.models.load import load_model
from lib.store import scan

CLOSE = 2e-5  # of the largest value: float32, one sample alone against a padded batch


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, texts) -> Place:
    folder = tmp_path_factory.mktemp("attribution")
    tiny_llama(folder / "model")
    return fetched(folder, texts)


@pytest.fixture(scope="module")
def model(place):
    return load_model(str(place.model), "float32", "eager", [torch.device("cpu")])


def alone(place: Place, model, name: str, rule: str = "attnlrp", **target) -> list[One]:
    return [one_sample(model, ids, rule, **target) for ids in place.samples(name).ids]


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


# Neuron level


def check_neurons(place: Place, columns: dict[str, np.ndarray], wanted: list[One], *overrides: str) -> set[str]:
    """Each layer's columns, where the layout says that they are. The kinds of layers that got no relevance at all."""
    parts, empty = place.experiment(*overrides).layout(place.cache), set()
    for part in parts:
        block, inputs = (slice(a, a + n) for a, n in ((part.first, part.outputs), (part.first_input, part.inputs)))
        near(columns["signed"][:, block], np.stack([one.signed[part.name] for one in wanted]))
        near(columns["abs"][:, block], np.stack([np.abs(one.product[part.name]).sum(1) for one in wanted]))
        near(columns["sumsq"][:, inputs], np.stack([one.sumsq[part.name] for one in wanted]))
        if not (columns["signed"][:, block].any() or columns["abs"][:, block].any()):
            empty.add(part.name.rpartition(".")[2])
    assert columns["signed"].shape[1] == columns["abs"].shape[1] == sum(part.outputs for part in parts)
    assert columns["target"].tolist() == [one.target for one in wanted]
    assert columns["tokens"].tolist() == [one.tokens for one in wanted]
    np.testing.assert_allclose(columns["logit"], [one.logit for one in wanted], rtol=1e-5)
    assert not columns["nonfinite"].any() and columns["nonfinite"].shape == (len(wanted), len(parts))
    return empty


@pytest.mark.parametrize("name", ROWS)
def test_neuron_rows_are_each_samples_own_scores(place, model, name):
    columns = place.results(name)
    assert check_neurons(place, columns, alone(place, model, name)) == set()
    assert columns["signed"].shape == (ROWS[name], 240)


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp", "gradient"])
def test_every_linear_layer_under_every_rule(place, model, rule):
    overrides = ("score.layers=[all]", f"score.rule={rule}")
    cut = {"q_proj", "k_proj", "gate_proj"} if rule == "cp_lrp" else set()
    for name in ("general-1", "toxic"):
        columns = place.results(name, *overrides)
        assert check_neurons(place, columns, alone(place, model, name, rule), *overrides) == cut


def test_layers_lie_side_by_side_in_forward_order(place):
    up = place.experiment().layout(place.cache)
    assert [(p.name, p.outputs, p.inputs, p.first) for p in up] == [
        (f"layers.{i}.mlp.up_proj", 80, 48, 80 * i) for i in range(3)
    ]
    every = place.experiment("score.layers=[all]").layout(place.cache)[7:14]  # of layer 1
    sizes = {"q": (48, 48), "k": (16, 48), "v": (16, 48), "o": (48, 48), "gate": (80, 48), "up": (80, 48)}
    assert [p.name.split(".")[-1] for p in every] == [f"{n}_proj" for n in (*sizes, "down")]
    assert [(p.outputs, p.inputs) for p in every] == [*sizes.values(), (48, 80)]
    assert [p.first - 336 for p in every] == [0, 48, 64, 80, 128, 208, 288]
    # q, k and v read one input, gate and up another: 48 + 48 + 48 + 80 a layer
    assert [p.first_input - 224 for p in every] == [0, 0, 0, 48, 96, 96, 144]
    assert [p.input_of.split(".")[-1][0] for p in every] == [*"vvvouud"]


def test_a_family_whose_checkpoint_has_other_names(place, texts, tmp_path):
    tiny_opt(tmp_path / "model", place.model)
    opt = fetched(tmp_path, texts)
    parts = opt.experiment("score.layers=[all]").layout(opt.cache)
    assert [p.name for p in parts[:6]] == [
        *(f"layers.0.self_attn.{n}_proj" for n in ("q", "k", "v")),
        *("layers.0.self_attn.out_proj", "layers.0.fc1", "layers.0.fc2"),
    ]
    own = load_model(str(tmp_path / "model"), "float32", "eager", [torch.device("cpu")])
    for overrides in (("score.layers=[all]",), ("score.layers=[fc1]", "score.rule=gradient")):
        rule = opt.experiment(*overrides).score.rule
        columns = opt.results("toxic", *overrides)
        assert check_neurons(opt, columns, alone(opt, own, "toxic", rule), *overrides) == set()


TARGETS = {"all": ("score.target=all",), "given": ("score.target=given", "score.tokens=[17, 5]")}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_explained(place, model, target):
    """All positions' largest logits, padded with -1 to the longest sample of any set; or tokens of one's own."""
    more = {"tokens": (17, 5)} if target == "given" else {}
    for name in ("general-0", "toxic"):
        columns = place.results(name, *TARGETS[target])
        wanted = alone(place, model, name, target=target, **more)
        if target == "all":
            assert columns["target"].shape[1] >= max(TOKENS, *map(len, place.samples("toxic").ids))
            for one in wanted:
                one.target += [-1] * (columns["target"].shape[1] - len(one.target))
        assert check_neurons(place, columns, wanted, *TARGETS[target]) == set()


def test_wandas_statistics_alone(place):
    """No gradient, so no target and no score; the same sums as beside LRP, at either level. Or no Wanda."""
    beside = place.results("toxic")
    columns = place.results("toxic", "score.scores=[]")
    assert set(columns) == {"tokens", "sumsq", "nonfinite"}
    near(columns["sumsq"], beside["sumsq"])
    assert np.array_equal(columns["tokens"], beside["tokens"])
    block = place.results("toxic", "score.scores=[]", "score.level=weight", "score.block=4")
    assert set(block) == {"samples", "tokens", "sumsq", "nonfinite"} and block["samples"].tolist() == [4, 2]
    near(block["sumsq"], np.stack([beside["sumsq"][:4].sum(0), beside["sumsq"][4:].sum(0)]))
    one = place.results("toxic", "score.scores=[signed]", "score.wanda=false")
    assert set(one) == {"tokens", "target", "logit", "signed", "nonfinite"}
    near(one["signed"], beside["signed"])


def test_held_out_prompts_are_left_for_evaluation(place, texts):
    """By the prompts' own file: those that are toxic enough, every second one kept back."""
    rows = [json.loads(line)["prompt"] for line in (texts / "prompts/prompts.jsonl").open()]
    toxic = [row["text"] for row in rows if row["toxicity"] is not None and row["toxicity"] >= 0.9][:PROMPTS]
    tokenizer = Tokenizer.from_file(str(place.model / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in toxic]
    assert len(ids) == PROMPTS and len({len(i) for i in ids}) > 3
    assert place.results("toxic")["tokens"].tolist() == [len(i) for i in ids[::2]]
    assert [s.tolist() for s in place.samples("toxic").ids] == ids[::2]
    assert [s.tolist() for s in place.samples("toxic").held_out] == ids[1::2]


def test_only_the_first_samples_for_a_trial(place):
    """A trial lies in a folder of its own."""
    few, whole = place.results("general-2", "max_samples=3"), place.results("general-2")
    assert len(few["tokens"]) == 3
    near(few["signed"], whole["signed"][:3])
    assert place.cell("general-2", "max_samples=3").path.parent != place.cell("general-2").path.parent


# Weight level

WEIGHT = ("score.level=weight", "score.block=3", "score.layers=[q_proj, down_proj]")


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_sums_of_blocks_whose_borders_the_experiment_sets(place, model, store):
    overrides = (*WEIGHT, f"score.store={store}")
    columns, wanted = place.results("general-0", *overrides), alone(place, model, "general-0")
    blocks = [wanted[:3], wanted[3:6], wanted[6:]]
    assert columns["samples"].tolist() == [3, 3, 1] and columns["tokens"].tolist() == [72, 72, 24]
    assert columns["target"].tolist() == [[one.target for one in b] + [[-1]] * (3 - len(b)) for b in blocks]
    for row, block in zip(columns["logit"], blocks, strict=True):
        np.testing.assert_allclose(row[: len(block)], [one.logit for one in block], rtol=1e-5)
        assert np.isnan(row[len(block) :]).all()
    parts = place.experiment(*overrides).layout(place.cache)
    assert columns["nonfinite"].tolist() == [[0] * len(parts)] * 3
    for part in parts:
        products = [[one.product[part.name] for one in block] for block in blocks]
        for kind, terms in (("signed", products), ("abs", [[np.abs(p) for p in block] for block in products])):
            sums, found = [sum(block) for block in terms], columns[f"{kind}/{part.name}"]
            loose = 2**-8 * sum(np.abs(s) for s in sums) if store == "bfloat16" else 0
            assert found.shape == (part.outputs, part.inputs) and found.dtype == np.float32 and found.any()
            assert (np.abs(found - sum(sums)) <= loose + CLOSE * np.abs(sum(sums)).max()).all()
        inputs = slice(part.first_input, part.first_input + part.inputs)
        near(columns["sumsq"][:, inputs], np.stack([sum(one.sumsq[part.name] for one in block) for block in blocks]))
    cell = place.cell("general-0", *overrides)
    shards = scan(cell.path, cell.digest)[0]
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 1), (1, 2), (2, 3)]
    with h5py.File(shards[0].file) as f:
        stored = columns_of(f)[f"signed/{parts[0].name}"]
        assert stored.dtype.itemsize == (2 if store == "bfloat16" else 4) and stored.shape == (1, 48, 48)
