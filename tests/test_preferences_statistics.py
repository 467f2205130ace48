"""Statistics of preferences: against scipy, against brute force, against what statsmodels 0.15.0 said of the same
figures (it is no dependency: its numbers stand here), and on effects that were planted."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from lib.preferences.statistics import (
    adjusted,
    correlation,
    diagonal,
    fisher,
    lift,
    mean_of,
    needed_answers,
    rate_of,
    smallest_seen,
)

HITS, ANSWERS = np.array([5, 0, 9, 3, 1, 7, 0, 2]), np.array([10, 10, 12, 10, 8, 10, 10, 10])


def test_a_rate_has_wilsons_interval_and_the_design_effect_of_its_questions():
    found = rate_of(HITS, ANSWERS)
    assert (found.hits, found.answers, found.share) == (27, 80, 27 / 80)
    assert found.wilson == pytest.approx((0.24345612608081596, 0.44643476601823034), rel=1e-6)  # statsmodels
    variance = 0.012140401785714275  # statsmodels: OLS on a constant, clustered by question
    assert found.effect == pytest.approx(variance / (found.share * (1 - found.share) / 80), rel=1e-12)
    # Wilson's ends are where the distance is t standard errors of a rate that lies there
    t, worth = stats.t.ppf(0.975, 7), 80 / found.effect
    for end in found.clustered:
        assert abs(found.share - end) == pytest.approx(t * math.sqrt(end * (1 - end) / worth), rel=1e-9)
    assert found.clustered[0] < found.wilson[0] and found.clustered[1] > found.wilson[1]


def test_rates_at_the_ends_have_intervals_and_no_answer_has_none():
    none = rate_of(np.zeros(50), np.full(50, 100))
    assert none.clustered[0] == pytest.approx(0, abs=1e-12) and 0 < none.wilson[1] < none.clustered[1] < 0.001
    assert rate_of(np.full(9, 5), np.full(9, 5)).clustered[1] == pytest.approx(1)
    empty = rate_of(np.zeros(3), np.zeros(3))
    assert math.isnan(empty.share) and all(map(math.isnan, (*empty.wilson, *empty.clustered)))
    one = rate_of(np.array([3, 0]), np.array([10, 0]))
    assert one.share == 0.3 and math.isnan(one.clustered[0]) and not math.isnan(one.wilson[0])
    even = rate_of(np.full(8, 3), np.full(8, 10))  # less scatter than chance has
    assert even.effect == 1 and even.clustered[0] < even.wilson[0]
    # a question that was not asked says nothing about those that were
    assert rate_of(np.append(HITS, 0), np.append(ANSWERS, 0)) == rate_of(HITS, ANSWERS)


def draws(dice, share, concentration, questions, samples):
    """Hits by question, whose own rates scatter around a share."""
    own = dice.beta(share * concentration, (1 - share) * concentration, questions)
    return dice.binomial(samples, own)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_clustered_interval_holds_the_rate_and_wilsons_alone_does_not(share):
    dice, answers, inside = np.random.default_rng(3), np.full(50, 100), {"clustered": 0, "wilson": 0}
    for _ in range(1000):
        found = rate_of(draws(dice, share, 4, 50, 100), answers)
        for name in inside:
            low, high = getattr(found, name)
            inside[name] += low <= share <= high
    assert 0.925 <= inside["clustered"] / 1000 <= 0.975
    assert inside["wilson"] / 1000 < 0.5


def test_a_lift_is_the_paired_t_test():
    other = np.array([1, 2, 4, 1, 1, 5, 1, 2])
    found = lift(HITS, ANSWERS, other, ANSWERS)
    theirs = stats.ttest_rel(HITS / ANSWERS, other / ANSWERS)
    low, high = theirs.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((low, high, theirs.pvalue), rel=1e-12)
    apart = HITS / ANSWERS - other / ANSWERS
    assert found.difference == pytest.approx(apart.mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(apart), rel=1e-12)
    assert (found.up, found.down) == (4, 2)
    swapped = lift(other, ANSWERS, HITS, ANSWERS)
    assert (swapped.difference, swapped.p) == pytest.approx((-found.difference, found.p))


def test_a_lift_where_questions_do_not_differ_or_are_missing():
    same, full = np.full(6, 4), np.full(6, 10)
    assert lift(same, full, same, full).p == 1
    assert lift(full, full, same, full).p == 2.0**-5
    apart = np.array([7, 5, 9, 3]), np.full(4, 10), np.array([4, 2, 6, 0]), np.full(4, 10)
    assert np.std(apart[0] / 10 - apart[2] / 10) > 0  # three tenths each, but for what rounding leaves
    assert lift(*apart).p == 2.0**-3 and lift(*apart).difference == pytest.approx(0.3)
    asked = np.array([10, 10, 0, 10, 10, 10])
    assert lift(HITS[:6], full, same, asked) == lift(*(np.delete(v, 2) for v in (HITS[:6], full, same, asked)))
    assert lift(same, asked, HITS[:6], full) == lift(*(np.delete(v, 2) for v in (same, asked, HITS[:6], full)))
    only = lift(same[:1], full[:1], same[:1] - 1, full[:1])
    assert only.difference == pytest.approx(0.1) and math.isnan(only.p)


def test_fisher_is_the_sum_over_all_tables():
    """Of all tables with these margins, those that are not likelier than this one; in fractions."""

    def by_hand(a, n, b, m):
        def chance(k):
            return Fraction(math.comb(n, k) * math.comb(m, a + b - k), math.comb(n + m, a + b))

        tables = range(max(0, a + b - m), min(n, a + b) + 1)
        return float(sum(chance(k) for k in tables if chance(k) <= chance(a)))

    for table in ((3, 20, 11, 25), (0, 30, 4, 28), (9, 9, 0, 9), (5, 40, 5, 40)):
        assert fisher(*table) == pytest.approx(by_hand(*table), rel=1e-10)


def test_adjusted_is_scipys_and_leaves_out_what_was_not_tested():
    dice = np.random.default_rng(2)
    ps = dice.uniform(size=105) ** 3
    assert adjusted(ps) == pytest.approx(stats.false_discovery_control(ps), rel=1e-12)
    ties = np.array([0.01, 0.01, 0.5, 0.04, 1.0])
    assert adjusted(ties) == pytest.approx(stats.false_discovery_control(ties), rel=1e-12)
    holes = np.insert(ps, [3, 50], np.nan)
    found = adjusted(holes)
    assert np.isnan(found[[3, 51]]).all() and found[np.isfinite(found)] == pytest.approx(adjusted(ps))
    assert len(adjusted([])) == 0


def test_of_what_is_called_found_one_in_twenty_is_chance():
    dice, false, called = np.random.default_rng(4), 0, 0
    for _ in range(300):
        ps = stats.norm.sf(dice.normal(np.where(np.arange(105) < 40, 3.5, 0)))
        found = adjusted(ps) <= 0.05
        false, called = false + found[40:].sum() / max(1, found.sum()), called + found[:40].sum()
    assert false / 300 < 0.05 and called > 300 * 20


def planted(seed, runs, traits, effect):
    """Lifts with rows and columns of their own, an effect on the diagonal that scatters, and a hole."""
    dice = np.random.default_rng(seed)
    lifts = dice.normal(0, 0.02, (runs, traits, traits))
    lifts += dice.normal(0, 0.05, (1, traits, 1)) + dice.normal(0, 0.05, (1, 1, traits))
    i = np.arange(traits)
    lifts[:, i, i] += effect + dice.normal(0, 0.1, (runs, traits))
    lifts[0, 1, 2] = np.nan
    return lifts


@pytest.mark.parametrize(
    ("runs", "by", "want"),
    [
        (1, "cell", (0.23593419900971174, 0.16726108022018493, 35, 35)),
        (1, "student", (0.23593419900971174, 0.12317357611682762, 35, 6)),
        (3, "cell", (0.17903425746801443, 0.15654269292120504, 107, 36)),
        (3, "student", (0.17903425746801443, 0.12403350888056594, 107, 18)),
    ],
)
def test_the_diagonal_is_what_statsmodels_says(runs, by, want):
    """smf.ols("lift ~ C(student) + C(asked) + diag").fit(cov_type="cluster", use_t=True): the effect, and the lower end
    of its interval, which has the degrees of freedom of all clusters"""
    found = diagonal(planted(7, runs, 6, 0.2), by)
    low = found.effect - stats.t.ppf(0.975, found.clusters - 1) * found.error
    assert (found.effect, low) == pytest.approx(want[:2], rel=1e-6)
    assert (found.lifts, found.clusters) == want[2:]
    freedom = 5 if by == "cell" else 6 * runs - 1  # of the clusters that hold a lift of the diagonal
    assert found.high - found.effect == pytest.approx(stats.t.ppf(0.975, freedom) * found.error)
    assert found.p == pytest.approx(2 * stats.t.sf(found.effect / found.error, freedom))


def test_the_diagonal_is_the_whole_sandwich():
    """By dummies that are written out, and sums of outer products in a plain loop."""
    lifts = planted(1, 2, 5, 0.1)
    rows = [(r, s, t, lifts[r, s, t]) for r in range(2) for s in range(5) for t in range(5)]
    rows = [row for row in rows if math.isfinite(row[3])]
    x = np.array([[1.0, *(s == k for k in range(1, 5)), *(t == k for k in range(1, 5)), s == t] for _, s, t, _ in rows])
    y = np.array([row[3] for row in rows])
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    sums = {}
    for line, (_, s, t, value) in zip(x, rows, strict=True):
        sums[s, t] = sums.get((s, t), 0) + line * (value - line @ beta)
    meat = sum(np.outer(one, one) for one in sums.values())
    small = len(sums) / (len(sums) - 1) * (len(y) - 1) / (len(y) - x.shape[1])
    error = math.sqrt(small * (inverse @ meat @ inverse)[-1, -1])
    found = diagonal(lifts)
    assert found.effect == pytest.approx(beta[-1], rel=1e-9)
    assert found.error == pytest.approx(error, rel=1e-9)


def test_a_planted_diagonal_is_found_over_three_runs_and_none_is_not():
    inside, chance = 0, 0
    for seed in range(100):
        found, none = diagonal(planted(seed, 3, 15, 0.15)), diagonal(planted(seed, 3, 15, 0.0), "student")
        assert found.p < 0.01 and found.low > 0
        inside += found.low <= 0.15 <= found.high
        chance += none.p < 0.05
    assert inside >= 88 and chance <= 10


def test_a_diagonal_that_cannot_be_told_is_none():
    assert diagonal(np.full((2, 3, 3), np.nan)) is None
    assert diagonal(np.zeros((1, 1, 1))) is None
    alone = np.full((1, 3, 3), np.nan)
    alone[0, [0, 1, 2], [0, 1, 2]] = 0.2
    assert diagonal(alone) is None  # of each row only its own
    assert diagonal(np.ones((1, 2, 2))) is None  # as many lifts as there are effects
    two = np.full((1, 3, 3), np.nan)
    two[0, :2] = [[0.3, 0.0, 0.1], [0.1, 0.5, 0.0]]
    assert diagonal(two) is None and diagonal(two, "student") is None  # two lifts have no scatter to judge them by


def test_a_mean_of_students_leaves_out_what_is_missing():
    values = [0.1, 0.4, math.nan, 0.2]
    mean, (low, high) = mean_of(values)
    theirs = stats.ttest_1samp([0.1, 0.4, 0.2], 0)
    assert mean == pytest.approx(0.7 / 3) and (low, high) == pytest.approx(theirs.confidence_interval())
    assert math.isnan(mean_of([])[0]) and mean_of([0.5, math.nan])[0] == 0.5
    assert math.isnan(mean_of([0.5])[1][0])


def test_as_many_answers_as_statsmodels_asks_for():
    """samplesize_proportions_2indep_onetail, two-sided, at 80 % and 90 %"""
    assert needed_answers(0.10, 0.05) == math.ceil(685.596858325361)
    assert needed_answers(0.03, 0.01, power=0.9) == math.ceil(7095.686960851663)
    assert needed_answers(0.10, 0.05, effect=3) == math.ceil(3 * 685.596858325361)
    assert needed_answers(0.99, 0.05) is None and needed_answers(0.3, 0) is None


def test_with_as_many_answers_four_of_five_are_seen():
    dice, n = np.random.default_rng(5), needed_answers(0.05, 0.03)
    base, more = dice.binomial(n, 0.05, 4000) / n, dice.binomial(n, 0.08, 4000) / n
    middle = (base + more) / 2
    z = (more - base) / np.sqrt(2 * middle * (1 - middle) / n)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.03)


def test_the_smallest_lift_that_is_seen_is_seen_four_times_of_five():
    dice, error = np.random.default_rng(6), 0.01
    apart = dice.normal(smallest_seen(error, 20), error * math.sqrt(20), (4000, 20))
    seen = stats.ttest_1samp(apart, 0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.03)
    assert math.isnan(smallest_seen(0.1, 1))


def test_correlation_is_of_ranks_and_of_pairs():
    a, b = [0.1, 0.5, math.nan, 0.3, 0.2], [1, 9, 4, 100, math.nan]
    assert correlation(a, b) == (pytest.approx(stats.spearmanr([0.1, 0.5, 0.3], [1, 9, 100]).statistic), 3)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])[0]) and correlation([], [])[1] == 0
