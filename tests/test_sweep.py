"""Sweeps, on a model with a planted behaviour: it is found and removed; what is stored is what plain models give."""

import os

import numpy as np
import pytest
import torch
from sparc3_world import fetched, make_world, roots
from tools import in_fork, module_work

from lib.base.errors import UserError
from lib.demo.speaker import Speaking
from lib.demo.texts import WORDS
from lib.families import load
from lib.inputs.samples import read_samples
from lib.pruning.findings import find, verdict
from lib.run.site import site
from lib.store import read_cell

FEW = ["selection.set=['methods=[lrp, activation, matched, random]', 'seeds=false', 'draws=2']"]


def run_chain(folder, *overrides):
    """Every stage by its job, in one process."""
    env, sweep = roots(folder), load(folder / "sweep.yaml", list(overrides))

    def work():
        for stage in [*sweep.stages(), None]:
            experiment = stage.experiment if stage else sweep
            config, said = (stage.config, stage.overrides) if stage else (folder / "sweep.yaml", overrides)
            for index in range(len(experiment.names())):
                arguments = "--config", str(config), "--index", str(index), *said
                try:
                    module_work(f"jobs.{experiment.job}", *arguments, env=env)()
                except SystemExit as e:
                    assert not e.code

    done = in_fork(work)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = fetched(make_world(tmp_path_factory.mktemp("planted")))
    run_chain(folder, *FEW)
    return folder


def seen(folder, *overrides):
    experiment = load(folder / "sweep.yaml", [*FEW, *overrides])
    cells = experiment.cells(folder / "cache", folder / "scratch")
    return experiment, find(experiment, cells, folder / "cache")


def test_the_planted_behaviour_is_found_and_removed_and_random_neurons_do_not_do_it(planted):
    _, found = seen(planted)
    before = found.dense.per_prompt("rude", "judge").mean()
    pruned = found.of("lrp", 16)[0]
    assert before > 0.9 and pruned.per_prompt("rude", "judge").mean() < 0.4
    for control in ("random", "matched"):
        assert all(one.per_prompt("rude", "judge").mean() > 0.8 for one in found.of(control, 16))
    assert pruned.perplexity["window128"] < 1.05 * found.dense.perplexity["window128"]
    assert verdict(found).startswith("Shown: without 16 neurons")
    words = [word in text for some in pruned.texts["rude"] for text in some for word in WORDS]
    assert sum(words) < sum(word in text for some in found.dense.texts["rude"] for text in some for word in WORDS) / 2


def plain(folder, chosen=()):
    """transformers' own model, its neurons multiplied by 0 where they come out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "speaker").double().eval()
    for layer, neuron in chosen:
        mask = model.model.layers[layer].mlp.down_proj
        mask.weight.data[:, neuron] = 0
    return model


def test_what_is_stored_is_what_a_plain_pruned_model_gives(planted):
    experiment, found = seen(planted)
    choice = experiment.choice
    ranking = next(c for c in choice.cells(planted / "cache", planted / "scratch") if c.name == "lrp")
    rows = read_cell(ranking, choice.schema(planted / "cache"), ["layer", "neuron"])
    text = read_samples(planted / "cache", experiment.set_of(planted / "cache", "text")).every[0].astype(np.int64)
    windows = torch.from_numpy(text[: len(text) // 128 * 128].reshape(-1, 128))
    for neurons, one in ((0, found.dense), (4, found.of("lrp", 4)[0]), (16, found.of("lrp", 16)[0])):
        model = plain(planted, list(zip(rows["layer"], rows["neuron"], strict=True))[:neurons])
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].log_softmax(-1)
        nll = -logits.gather(-1, windows[:, 1:, None])[..., 0].sum(1)
        np.testing.assert_allclose(one.nll["window128"], nll.numpy(), rtol=1e-5)
        assert one.perplexity["window128"] == pytest.approx(float(torch.exp((nll / 127).mean())), rel=1e-5)
        assert (one.predictions["window128"] == 127).all()


def test_prompts_are_those_that_were_held_out(planted):
    experiment, found = seen(planted)
    samples = read_samples(planted / "cache", experiment.set_of(planted / "cache", "rude"))
    assert found.dense.toxicity["rude", "judge"].shape == (len(samples.held_out), 3)
    attributed = {tuple(ids) for ids in samples.ids}
    assert len(samples.held_out) == 24 and not attributed & {tuple(ids) for ids in samples.held_out}
    held_in = ["selection.set=['attribution.set=[data.prompts.rude.held_out=false]']"]
    fetched(planted, *held_in)
    with pytest.raises(UserError, match="no prompt of rude is held out"):
        load(planted / "sweep.yaml", held_in).schema(planted / "cache")


def test_the_dense_model_is_whole_again_after_every_setting(planted, tmp_path):
    """Dense computed last, in a process that has pruned before it, is dense computed first."""
    env = roots(planted, SUITE_SCRATCH=str(tmp_path / "scratch"))
    sweep = load(planted / "sweep.yaml", FEW)
    for stage in sweep.stages():
        label = stage.experiment.label
        (tmp_path / "scratch").mkdir(exist_ok=True)
        (tmp_path / "scratch" / label).symlink_to(planted / "scratch" / label)

    def work():
        os.environ.update(env)
        site.cache_clear()
        torch.set_num_threads(1)  # more of them do not survive a fork
        from lib.pruning.kernel import load_kernel
        from lib.run.command import job

        job_of = job("prune_and_evaluate", "", load, ["--config", str(planted / "sweep.yaml"), "--index", "0", *FEW])
        cells = job_of.cells()
        lrp = next(cell for cell in cells if cell.name == "lrp")
        kernel, _ = load_kernel(job_of, sweep, lrp)
        kernel.compute(kernel.prepare(0, 2))
        dense, _ = load_kernel(job_of, sweep, cells[0])
        columns, _ = dense.compute(dense.prepare(0, 1))
        schema = sweep.schema(planted / "cache")
        stored = read_cell(sweep.cells(planted / "cache", planted / "scratch")[0], schema, schema)
        for name, values in stored.items():
            assert (
                list(values) == list(columns[name]) if isinstance(values, list) else (values == columns[name]).all()
            ), name

    done = in_fork(work)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sizes=[16, 4]"], "sizes must rise"),
        (["sizes=[4, 64]"], "64 is more than the 32 neurons of choosing"),
        (["evaluate.completions.temperature=0"], "per_prompt is 1"),
        (["evaluate.neutral={rude: {id: x}}"], "is a behaviour of speaking"),
        (["expected=[{measure: word, value: 1, source: x}]"], "measure 'word' is not looked at"),
        (["expected=[{measure: toxicity, value: 1, source: x, neurons: 4}]"], "name a method"),
        (["evaluate.judges=[{id: a/b}, {id: c/b}]"], "holds one twice"),
        (["selection.config=attribution.yaml"], "kind: must be one of selection"),
        (["evaluate.window=5000"], "positions"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_sentence(planted, overrides, words):
    done = in_fork(
        module_work(
            "jobs.prune_and_evaluate",
            *("--config", str(planted / "sweep.yaml"), "--index", "0", *FEW, *overrides),
            env=roots(planted),
        )
    )
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert (
        len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
        and "Traceback" not in done.stderr
    )


def test_a_saved_model_is_the_pruned_one(planted):
    from transformers import AutoModelForCausalLM

    env, experiment = roots(planted), load(planted / "sweep.yaml", FEW)
    arguments = "--config", str(planted / "sweep.yaml"), *FEW
    done = in_fork(module_work("jobs.save_pruned", *arguments, "--ranking", "lrp", "--neurons", "16", env=env))
    assert done.returncode == 0, done.stderr
    ids = torch.arange(3, 90)[None]
    choice = experiment.choice
    cell = next(c for c in choice.cells(planted / "cache", planted / "scratch") if c.name == "lrp")
    rows = read_cell(cell, choice.schema(planted / "cache"), ["layer", "neuron"])
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(done.stdout.strip().splitlines()[-1]).double().eval()(ids).logits
        mine = plain(planted, list(zip(rows["layer"], rows["neuron"], strict=True))[:16])(ids).logits
    torch.testing.assert_close(saved, mine)
    for wrong, words in ((("--ranking", "lrpp"), "did you mean lrp"), (("--neurons", "99"), "has 1 to 32")):
        done = in_fork(module_work("jobs.save_pruned", *arguments, *wrong, env=env))
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_setting_that_was_lost_is_made_again_and_the_report_is_the_same_byte_for_byte(planted):
    env, arguments = roots(planted), ("--config", str(planted / "sweep.yaml"), *FEW)

    def reported():
        done = in_fork(module_work("jobs.sparc3_report", *arguments, env=env))
        folder = planted / "output" / load(planted / "sweep.yaml", FEW).label
        return done, {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    done, before = reported()
    assert done.returncode == 0 and "Shown: without 16 neurons" in done.stdout, done.stderr
    assert {p.name for p in before} >= {
        "index.html",
        "effect.png",
        "lrp.csv",
        "lrp.json",
        "settings.csv",
        "lrp-16.jsonl",
    }
    cells = load(planted / "sweep.yaml", FEW).cells(planted / "cache", planted / "scratch")
    lrp = next(cell for cell in cells if cell.name == "lrp")
    for path in lrp.path.glob("00000001-*"):
        path.unlink()
    done, missing = reported()
    assert done.returncode == 2 and "1 of 13 settings are not done, and shown as missing (lrp 16)" in done.stderr
    assert b"missing" in missing[next(p for p in missing if p.name == "report.txt")].lower()
    index = "--index", str(lrp.index)
    assert in_fork(module_work("jobs.prune_and_evaluate", *arguments, *index, env=env)).returncode == 0
    assert reported()[1] == before


def test_a_model_without_the_behaviour_gets_the_sentence_that_nothing_is_shown(tmp_path):
    folder = fetched(make_world(tmp_path, Speaking(steps=60, planted=False)))
    run_chain(folder, *FEW)
    _, found = seen(folder)
    said = verdict(found)
    assert said.startswith("An effect is not shown: at no size does mean toxicity fall"), said
