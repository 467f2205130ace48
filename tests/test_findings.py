"""A sweep's statistics against scipy, and the sentence that is said when nothing is shown."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from lib.pruning.findings import (
    Findings,
    Seen,
    against,
    change,
    compared,
    effects,
    flipped,
    holm,
    interval,
    perplexity_change,
    sign_test,
    verdict,
)
from lib.pruning.methods import Ranking

PROMPTS, SAMPLES = 60, 5


def noise(seed, mean, spread=0.15):
    return np.clip(np.random.default_rng(seed).normal(mean, spread, PROMPTS), 0, 1)


def test_an_interval_is_scipys_bootstrap():
    values = noise(1, 0.4)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=3)
    np.testing.assert_allclose(interval(values), theirs.confidence_interval, atol=2e-3)


def test_p_is_scipys_permutation_of_signs():
    for seed, shift in ((1, 0.0), (2, 0.03), (3, 0.1)):
        difference = np.random.default_rng(seed).normal(-shift, 0.15, PROMPTS)
        theirs = scipy.stats.permutation_test(
            (difference, np.zeros(PROMPTS)), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples",
            vectorized=True, n_resamples=20_000, rng=1,
        )  # fmt: skip
        assert flipped(difference) == pytest.approx(theirs.pvalue, abs=0.02)
    assert flipped(np.zeros(10)) == 1.0


def test_the_sign_test_is_scipys():
    for improved, worse in ((51, 42), (10, 0), (0, 0), (3, 3), (24, 1)):
        theirs = scipy.stats.binomtest(improved, improved + worse).pvalue if improved + worse else 1.0
        assert sign_test(improved, worse) == pytest.approx(theirs)


def test_holm_by_its_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_against_controls_draws_them_again():
    values, controls = noise(1, 0.3), np.stack([noise(10 + d, 0.5) for d in range(5)])
    middle, low, high = against(values, controls)
    assert middle == pytest.approx(values.mean() - controls.mean())
    variance = values.var(ddof=1) / PROMPTS + controls.mean(1).var() / 5 + controls.mean(0).var() / PROMPTS
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.25)
    far = np.stack([np.full(PROMPTS, d / 10) for d in range(5)])  # draws that differ widely
    _, low, high = against(np.full(PROMPTS, 0.2), far)
    assert low < -0.05 and high > 0.05


def seen(ranking, neurons, toxicity, perplexity=10.0, neutral=0.02):
    """Every completion of a prompt scores the same."""
    columns = [toxicity, np.full(PROMPTS, neutral) if np.isscalar(neutral) else neutral]
    scores = {(n, "judge"): np.repeat(c[:, None], SAMPLES, 1) for n, c in zip(("rude", "plain"), columns, strict=True)}
    nll = {"window128": np.full(8, 127 * np.log(perplexity))}
    return Seen(
        ranking, neurons, {"window128": perplexity}, nll, {"window128": np.full(8, 127)}, scores,
        {name: np.full((PROMPTS, SAMPLES), 0.9) for name in ("rude", "plain")}, {}, {},
    )  # fmt: skip


def findings(**ways):
    """`ways`: method -> (toxicity by prompt, perplexity, neutral) at 10 neurons, or several draws of it."""
    evaluate = SimpleNamespace(judge_names=["judge"], neutral={"plain": None}, effect="toxicity")
    choice = SimpleNamespace(undesired="rude", methods=list(ways))
    experiment = SimpleNamespace(evaluate=evaluate, choice=choice, sizes=[10])
    found = Findings(experiment)
    found.seen["dense", 0] = seen(None, 0, noise(0, 0.5))
    for method, values in ways.items():
        for draw, value in enumerate(values if isinstance(values, list) else [values]):
            ranking = Ranking(method, draw=draw if isinstance(values, list) else None)
            found.seen[ranking.name, 10] = seen(ranking, 10, *value)
    return found


BASE = noise(0, 0.5)
LOWER = np.clip(BASE - 0.2 + noise(5, 0, 0.02), 0, 1)
STRAYED = np.clip(BASE + np.random.default_rng(7).normal(0, 0.05, PROMPTS), 0, 1)
CONTROLS = {"matched": [(np.clip(BASE + noise(d, 0, 0.02) - 0.01, 0, 1),) for d in range(3)]}


def test_an_effect_is_shown_where_there_is_one():
    found = findings(lrp=(LOWER,), **CONTROLS)
    assert verdict(found).startswith("Shown: without 10 neurons the mean toxicity on rude goes from")
    (effect,) = effects(found, "lrp")
    assert effect.change.improved > 55 and effect.shown


@pytest.mark.parametrize(
    ("ways", "why"),
    [
        (
            {"lrp": (np.clip(BASE + np.random.default_rng(7).normal(0, 0.05, PROMPTS), 0, 1),), **CONTROLS},
            "more than chance",
        ),
        ({"lrp": (LOWER,), "matched": [(LOWER + 0.001,), (LOWER - 0.001,)]}, "does not fall further than by pruning"),
        ({"lrp": (LOWER, 12.0), **CONTROLS}, "the model is harmed"),
        ({"lrp": (LOWER, 10.0, noise(9, 0.2)), **CONTROLS}, "the model is harmed"),
        ({"lrp": (LOWER,)}, "a control, of which none is there"),
    ],
)
def test_an_effect_that_is_not_shown_is_not_claimed(ways, why):
    said = verdict(findings(**ways))
    assert said.startswith("An effect is not shown:") and why in said, said


def test_a_cheaper_ranking_that_is_as_good_is_named():
    assert "lrp does not beat activation" in compared(
        findings(lrp=(LOWER,), activation=(LOWER,), **CONTROLS), "lrp", "activation"
    )
    less = np.clip(LOWER + 0.1, 0, 1)
    assert "lrp beats activation" in compared(
        findings(lrp=(LOWER,), activation=(less,), **CONTROLS), "lrp", "activation"
    )
    assert "not to be said" in compared(findings(lrp=(LOWER,), **CONTROLS), "lrp", "activation")


def test_without_the_dense_model_nothing_is_said():
    found = findings(lrp=(LOWER,), **CONTROLS)
    del found.seen["dense", 0]
    assert verdict(found).startswith("Nothing can be said yet")


def test_perplexity_moves_by_windows():
    before, after = seen(None, 0, BASE), seen(None, 0, BASE, perplexity=10.5)
    middle, low, high = perplexity_change(before, after, "window128")
    assert middle == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)
    assert change(BASE, LOWER).difference == pytest.approx((LOWER - BASE).mean())


def test_where_repetition_is_the_effect_it_is_judged_by_the_tokens():
    found = findings(lrp=(LOWER,), **CONTROLS)
    found.experiment.evaluate.effect = "repetition"
    assert verdict(found).startswith("An effect is not shown: at no size does mean share of repeated tokens fall")
    repeats = np.random.default_rng(4).uniform(0.3, 0.6, (PROMPTS, SAMPLES))
    for (name, _), one in found.seen.items():
        one.unique["rude"] = 1 - (repeats / 3 if name == "lrp" else repeats)
    one.unique["rude"][0, 0] = np.nan  # a completion without a token repeats none
    assert verdict(found).startswith(
        "Shown: without 10 neurons the mean share of repeated tokens on rude goes from 0.4"
    )
