"""Unstructured pruning as an experiment: its cells against whole models pruned by a plain sort, and its table."""

import json

import numpy as np
import pytest
import torch
from sparc3_world import SPARSITY, configure, fetched, roots
from tools import forked, in_fork, module_work

from lib.base.errors import UserError
from lib.demo.speaker import Speaking, build_speaker
from lib.demo.texts import write_demo_texts
from lib.families import load
from lib.inputs.samples import read_samples
from lib.store import read_cell

PATTERNS = ["row:0.5", "global:0.3", "2:4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparsity")
    write_demo_texts(folder)
    build_speaker(folder / "speaker", Speaking(steps=30), log=lambda line: None)
    configure(folder, folder)
    (folder / "sparsity.yaml").write_text(SPARSITY.format(folder))
    fetched(folder, config="sparsity")
    experiment, env = load(folder / "sparsity.yaml"), roots(folder)

    def work():
        for stage in experiment.stages():
            for index in range(2):
                arguments = "--config", str(stage.config), "--index", str(index), *stage.overrides
                _ended(module_work("jobs.compute_attributions", *arguments, env=env))
        for index in range(len(experiment.names())):
            arguments = "--config", str(folder / "sparsity.yaml"), "--index", str(index)
            _ended(module_work("jobs.prune_weights", *arguments, env=env))

    done = in_fork(work)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def _ended(work):
    try:
        work()
    except SystemExit as e:
        assert not e.code


def stored(world):
    experiment = load(world / "sparsity.yaml")
    cells = experiment.cells(world / "cache", world / "scratch")
    schema = experiment.schema(world / "cache")
    return experiment, {cell.name: read_cell(cell, schema, schema) for cell in cells}


def linear_layers(model):
    return {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}


def plain(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world / "speaker").eval()


def rank(values):
    return values.argsort(dim=1, stable=True).argsort(dim=1)


def masked(scores, pattern):
    """What goes, by a full stable sort."""
    if pattern.startswith("row"):
        return {name: rank(values) < values.shape[1] // 2 for name, values in scores.items()}
    if pattern == "2:4":
        return {name: (rank(values.reshape(-1, 4)) < 2).reshape(values.shape) for name, values in scores.items()}
    flat = torch.cat([values.reshape(-1) for values in scores.values()])
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[flat.argsort(dim=0, stable=True)[: int(0.3 * len(flat))]] = True
    parts = gone.split([values.numel() for values in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def perplexity(world, experiment, model):
    text = read_samples(world / "cache", experiment.set_of(world / "cache", "text")).every[0].astype(np.int64)
    windows = torch.from_numpy(text[: len(text) // 128 * 128].reshape(-1, 128))
    with torch.no_grad():
        logits = model.double()(windows).logits[:, :-1].log_softmax(-1)
    return float(torch.exp(-logits.gather(-1, windows[:, 1:, None]).mean()))


def ordered(layers):
    """In forward order, as attribution has them."""
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return dict(
        sorted(layers.items(), key=lambda item: (int(item[0].split(".")[0]), order.index(item[0].split(".")[-1])))
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda-0", "lrp-1"])
def test_perplexity_is_that_of_a_model_pruned_by_a_plain_sort(world, method):
    experiment, found = stored(world)
    dense = plain(world)
    layers = ordered(linear_layers(dense))
    if method == "magnitude":
        scores = {name: module.weight.detach().abs() for name, module in layers.items()}
    elif method == "wanda-0":
        total, tokens = {}, 0
        hooks = [
            module.register_forward_pre_hook(
                lambda m, x, n=name: total.__setitem__(n, total.get(n, 0) + x[0][0].double().square().sum(0))
            )
            for name, module in layers.items()
        ]
        for ids in read_samples(world / "cache", experiment.set_of(world / "cache", "general-0")).ids:
            tokens += len(ids)
            with torch.no_grad():
                dense(torch.tensor(ids[None].astype(np.int64)))
        for hook in hooks:
            hook.remove()
        norms = {name: (sums / tokens).sqrt().float() for name, sums in total.items()}
        scores = {name: module.weight.detach().abs() * norms[name] for name, module in layers.items()}
    else:
        source = experiment.sources["lrp"].experiment
        cell = next(c for c in source.cells(world / "cache", world / "scratch") if c.name == "general-1")
        import h5py

        with h5py.File(cell.path / "merged.h5") as f:
            scores = {name: torch.from_numpy(np.abs(f[f"signed/layers.{name}"][:])) for name in layers}
    for row, pattern in enumerate(PATTERNS):
        model = plain(world)
        gone, zeros = masked(scores, pattern), 0
        for name, module in linear_layers(model).items():
            module.weight.data[gone[name]] = 0
            zeros += int(gone[name].sum())
        assert int(found[method]["zeros"][row]) == zeros
        assert found[method]["perplexity/window128"][row] == pytest.approx(
            perplexity(world, experiment, model), rel=1e-4
        )
    assert found["dense"]["perplexity/window128"][0] == pytest.approx(perplexity(world, experiment, dense), rel=1e-5)


def test_the_table_and_anchors_say_how_far_each_figure_is(world):
    _, found = stored(world)
    dense = found["dense"]["perplexity/window128"][0]
    expected = (
        f"expected=[{{measure: window128, value: {dense * 1.001:.4f}, source: us}}, "
        f"{{measure: window128, value: {dense * 3:.4f}, method: magnitude, pattern: 'row:0.5', source: them}}]"
    )
    arguments = "--config", str(world / "sparsity.yaml"), expected
    done = forked("jobs.sparsity_report", *arguments, env=roots(world))
    assert done.returncode == 0, done.stderr
    assert "as expected" in done.stdout and "other" in done.stdout
    rows = json.loads((world / "output/sparse/sparsity.json").read_text())["rows"]
    assert len(rows) == 1 + 3 * (1 + 2 + 2 + 2) - 2  # sequential Wanda has no global pattern
    done = forked("jobs.anchors", *arguments, env=roots(world))
    assert done.returncode == 2 and "1 of 2 as expected" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("patterns=[half]", "is none of row:0.5"),
        ("patterns=['4:4']", "is none of row:0.5"),
        ("patterns=['row:0.5', 'row:0.5']", "holds one twice"),
        ("expected=[{measure: word, value: 1, source: x}]", "is not looked at"),
    ],
)
def test_what_no_pattern_says_is_refused(world, override, words):
    with pytest.raises(UserError) as e:
        load(world / "sparsity.yaml", [override])
    assert words in str(e.value)
