"""Selections: every ranking against plain numpy over the attribution's own shards, and what a configuration may ask."""

import numpy as np
import pytest
from sparc3_world import fetched, make_world, roots
from tools import forked

from lib.base.errors import UserError
from lib.demo.speaker import Speaking
from lib.families import load
from lib.store import read_cell


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every attribution and every ranking, by the jobs."""
    folder = fetched(make_world(tmp_path_factory.mktemp("selection"), Speaking(steps=20)))
    env = roots(folder)
    experiment = load(folder / "selection.yaml")
    for stage in experiment.stages():
        for index in range(3):
            done = forked(
                "jobs.compute_attributions",
                *("--config", str(stage.config), "--index", str(index), *stage.overrides),
                env=env,
            )
            assert done.returncode == 0, done.stderr
    for index in range(len(experiment.names())):
        done = forked("jobs.select_neurons", "--config", str(folder / "selection.yaml"), "--index", str(index), env=env)
        assert done.returncode == 0, done.stderr
    return folder


def rows(world, *overrides):
    experiment = load(world / "selection.yaml", list(overrides))
    cells = experiment.cells(world / "cache", world / "scratch")
    schema = experiment.schema(world / "cache")
    return experiment, {cell.name: read_cell(cell, schema, schema) for cell in cells}


def attributed(world, experiment, source, name, column):
    """[S, N] of a set, by its own shards."""
    stage = experiment.sources[source].experiment
    cell = next(c for c in stage.cells(world / "cache", world / "scratch") if c.name == name)
    return read_cell(cell, stage.schema(world / "cache"), [column, "tokens"])


def test_rankings_are_a_full_sort_of_the_difference_of_means(world):
    experiment, found = rows(world)
    for method, source, column in (
        ("lrp", "own", "signed"),
        ("absolute", "own", "abs"),
        ("gradient", "gradient", "signed"),
    ):
        sets = {n: attributed(world, experiment, source, n, column)[column] for n in ("general-0", "general-1", "rude")}
        means = {name: values.astype(np.float64).mean(0) for name, values in sets.items()}
        for suffix, general in (
            ("", (means["general-0"] + means["general-1"]) / 2),
            ("-0", means["general-0"]),
            ("-1", means["general-1"]),
        ):
            difference = general - means["rude"]
            order = sorted(range(256), key=lambda n: (difference[n], n))[:32]
            mine = found[method + suffix]
            assert (128 * mine["layer"] + mine["neuron"]).tolist() == order
            np.testing.assert_allclose(mine["value"], difference[order], rtol=1e-9)
            np.testing.assert_allclose(mine["general"], general[order], rtol=1e-9)
            np.testing.assert_allclose(mine["undesired"], means["rude"][order], rtol=1e-9)


def test_an_interval_is_that_of_the_two_means(world):
    experiment, found = rows(world)
    variance, values = 0.0, {}
    for name in ("general-0", "general-1", "rude"):
        values[name] = attributed(world, experiment, "own", name, "signed")["signed"].astype(np.float64)
        weight = 1.0 if name == "rude" else 0.5
        variance += weight**2 * values[name].var(0, ddof=1) / len(values[name])
    mine = found["lrp"]
    place = 128 * mine["layer"] + mine["neuron"]
    np.testing.assert_allclose(mine["high"] - mine["low"], 2 * 1.959964 * np.sqrt(variance[place]), rtol=1e-6)
    assert np.isnan(found["random-0"]["low"]).all() and np.isnan(found["wanda"]["low"]).all()


def test_ranks_tell_where_each_seed_alone_puts_a_neuron(world):
    _, found = rows(world)
    for seed in (0, 1):
        own = [
            (int(a), int(b)) for a, b in zip(found[f"lrp-{seed}"]["layer"], found[f"lrp-{seed}"]["neuron"], strict=True)
        ]
        both = zip(found["lrp"]["layer"], found["lrp"]["neuron"], strict=True)
        expected = [own.index((int(a), int(b))) if (int(a), int(b)) in own else -1 for a, b in both]
        assert found["lrp"]["ranks"][:, seed].tolist() == expected
    assert (found["magnitude"]["ranks"] == -1).all()


def test_the_activation_contrast_is_forward_only_and_of_the_neurons_outputs(world):
    import torch
    from transformers import AutoModelForCausalLM

    from lib.inputs.samples import read_samples

    experiment, found = rows(world)
    model = AutoModelForCausalLM.from_pretrained(world / "speaker").double()
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    means = {}
    for name in ("general-0", "general-1", "rude"):
        samples, per_sample = read_samples(world / "cache", experiment.base.input_of(world / "cache", name)).ids, []
        for ids in samples:
            seen.clear()
            with torch.no_grad():
                model(torch.tensor(ids[None].astype(np.int64)))
            per_sample.append(torch.cat([x.square().mean(0).sqrt() for x in seen]).numpy())
        means[name] = np.mean(per_sample, 0)
    difference = (means["general-0"] + means["general-1"]) / 2 - means["rude"]
    mine = found["activation"]
    np.testing.assert_allclose(mine["value"], np.sort(difference)[:32], rtol=1e-4)


def test_magnitude_and_controls(world):
    from safetensors.numpy import load_file

    _, found = rows(world)
    weights = load_file(world / "speaker/model.safetensors")
    norms = [np.linalg.norm(weights[f"model.layers.{i}.mlp.up_proj.weight"].astype(np.float64), axis=1) for i in (0, 1)]
    mine = found["magnitude"]
    assert (128 * mine["layer"] + mine["neuron"]).tolist() == np.argsort(np.concatenate(norms), kind="stable")[
        :32
    ].tolist()
    place = {name: 128 * found[name]["layer"] + found[name]["neuron"] for name in found}
    draws = [tuple(place[f"random-{d}"]) for d in range(3)]
    assert len({*draws}) == 3 and all(len({*draw}) == 32 for draw in draws)
    for draw in range(3):
        np.testing.assert_array_equal(found[f"matched-{draw}"]["layer"], found["lrp"]["layer"])
        assert not {*place[f"matched-{draw}"]} & {*place["lrp"]}


def test_layer_scope_takes_as_many_of_each_layer(world):
    env = roots(world)
    done = forked(
        "jobs.select_neurons",
        *("--config", str(world / "selection.yaml"), "--index", "0", "scope=layer", "neurons=5"),
        env=env,
    )
    assert done.returncode == 0, done.stderr
    experiment = load(world / "selection.yaml", ["scope=layer", "neurons=5"])
    cell = experiment.cells(world / "cache", world / "scratch")[0]
    mine = read_cell(cell, experiment.schema(world / "cache"), ["layer", "value"])
    assert mine["layer"].tolist() == [0, 1] * 5
    for layer in (0, 1):
        assert (np.diff(mine["value"][mine["layer"] == layer]) >= 0).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["undesired=rudd"], "'rudd' is no behaviour of speaking: rude"),
        (["neurons=300"], "300 of 256 cannot be selected"),
        (["attribution.set=[score.wanda=false]"], "methods: wanda cannot be read from"),
        (["attribution.set=['score.scores=[abs]']"], "lrp, undesired, matched cannot be read from"),
        (["attribution.set=[score.level=weight]"], "a selection is of neurons"),
        (["attribution.set=['score.layers=[q_proj]']"], "take it from `methods`"),
        (["attribution.config=nowhere.yaml"], "no such file"),
        (["methods=[lrp, lrp]"], "holds one twice"),
    ],
)
def test_what_cannot_be_read_is_refused(world, overrides, words):
    with pytest.raises(UserError) as e:
        load(world / "selection.yaml", overrides).cells(world / "cache", world / "scratch")
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_cell_waits_for_what_it_reads_from(world, tmp_path):
    env = roots(world, SUITE_SCRATCH=str(tmp_path))
    done = forked("jobs.select_neurons", "--config", str(world / "selection.yaml"), "--index", "0", env=env)
    assert done.returncode == 2 and "is blocked: speaking/general-0, which it reads from, is not done" in done.stderr
    index = str(list(load(world / "selection.yaml").names()).index("random-0"))
    done = forked("jobs.select_neurons", "--config", str(world / "selection.yaml"), "--index", index, env=env)
    assert done.returncode == 0, done.stderr
