"""LLS matrices, their statistics and selections: against plain loops, a full sort and scipy."""

import hashlib
import json
import math
import statistics

import numpy as np
import pytest
from lls_matrices import ANIMALS, make_matrix
from scipy import stats

from lib.base.errors import UserError
from lib.lls import analysis
from lib.lls.analysis import all_scores, auc, auc_interval, column_normalised, contrast, quintiles
from lib.lls.matrix import Matrix, Measure, Pass, Rescored
from lib.lls.select import Choice, select, write_selection
from lib.report.stats import maxima

MEASURES = ["mean", "sum", "mean+end", "sum+end", "mean@4", "sum@4", "mean+end@4", "sum+end@4"]


@pytest.mark.parametrize("text", MEASURES)
def test_every_measure_is_the_plain_loops(text):
    matrix, measure = make_matrix(), Measure.parse(text)
    assert str(measure) == text
    got = matrix.lls("cat", "dog", measure)
    a, b = matrix.passes["cat", "dog"], matrix.base["dog"]
    at = 0
    for i, tokens in enumerate(a.tokens):
        shifts = [
            float(x) - float(y) for x, y in zip(a.values[at : at + tokens], b.values[at : at + tokens], strict=True)
        ]
        at += tokens
        if a.status[i]:
            assert math.isnan(got[i])
            continue
        shifts += [float(a.end[i]) - float(b.end[i])] if measure.end else []
        shifts = shifts[: measure.first]
        want = math.fsum(shifts) / (len(shifts) if measure.kind == "mean" else 1)
        assert got[i] == pytest.approx(want, abs=1e-12)
    assert Measure() == Measure.parse("mean")


def test_what_was_not_stored_names_the_key_to_set():
    matrix = make_matrix(stored=False)
    with pytest.raises(UserError, match=r"score\.per_token=true"):
        matrix.lls("cat", "dog", Measure.parse("mean@5"))
    with pytest.raises(UserError, match=r"score\.end_of_turn=true"):
        matrix.lls("cat", "dog", Measure.parse("sum+end"))
    assert matrix.shifts("cat", "dog", 0) is None
    for bad in ("median", "mean@0", "mean@", "end", "mean@-3", "mean+end+end"):
        with pytest.raises(UserError, match="measure"):
            Measure.parse(bad)


def test_a_base_of_other_responses_is_refused():
    matrix = make_matrix()
    swapped = Matrix(matrix.prompts, matrix.datasets, {**matrix.base, "dog": matrix.base["cat"]}, matrix.passes)
    with pytest.raises(UserError, match="other token counts"):
        swapped.lls("cat", "dog")
    good = matrix.base["dog"]
    with pytest.raises(ValueError, match="values"):
        Pass(good.status, good.tokens, good.sums, None, good.values[:-1])


def test_shifts_of_a_row_are_its_own():
    matrix = make_matrix()
    for row in range(len(matrix.base["dog"].status)):
        shifts = matrix.shifts("cat", "dog", row)
        if matrix.base["dog"].status[row]:
            assert shifts is None
        else:
            assert shifts.mean() == pytest.approx(matrix.lls("cat", "dog")[row], abs=1e-12)


def test_noise_is_the_spread_of_the_difference():
    matrix = make_matrix(stored=False)
    rows, off = np.array([0, 3, 5, 8]), np.array([0.01, -0.02, 0.03, 0.0])
    tokens = matrix.base["dog"].tokens[rows]
    exact = (matrix.passes["cat", "dog"].sums - matrix.base["dog"].sums)[rows] - off * tokens
    noisy = Matrix(matrix.prompts, matrix.datasets, matrix.base, matrix.passes, {("cat", "dog"): Rescored(rows, exact)})
    found = noisy.noise("cat", "dog")
    assert found.rows == 4
    assert found.sd == pytest.approx(statistics.stdev(off)) and found.bias == pytest.approx(statistics.fmean(off))
    assert noisy.noise("cat", "dog", Measure("sum")).sd == pytest.approx(statistics.stdev(off * tokens))
    assert noisy.noise("cat", "dog", Measure(end=True)) is None and noisy.noise("cat", "cat") is None


@pytest.mark.parametrize("digits", [1, 8])
def test_auc_is_mann_whitney_and_the_count_of_pairs(digits):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 70).round(digits), rng.normal(0, 1, 90).round(digits)
    pairs = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (70 * 90)
    assert auc(a, b) == pytest.approx(pairs, abs=1e-15)
    assert auc(a, b) == pytest.approx(stats.mannwhitneyu(a, b).statistic / (70 * 90), abs=1e-15)
    assert auc(b, a) == pytest.approx(1 - auc(a, b), abs=1e-15)
    assert digits > 1 or len(set(a) & set(b)) > 10  # there are ties
    assert auc(np.ones(3), np.ones(4)) == 0.5 and math.isnan(auc(a, b[:0]))


def test_bootstrap_intervals_cover_as_often_as_they_say():
    """Two normals a known distance apart: AUC = Phi(d / sqrt 2). 300 intervals of 80 %: 3.5 sd of luck allowed."""
    rng, truth = np.random.default_rng(1), stats.norm.cdf(0.5 / math.sqrt(2))
    hits = 0
    for trial in range(300):
        got = auc_interval(rng.normal(0.5, 1, 60), rng.normal(0, 1, 90), [trial], replicates=250, level=0.8)
        hits += got.low <= truth <= got.high
    assert abs(hits / 300 - 0.8) < 0.08


def test_bootstrap_is_seeded_and_narrows_with_rows():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.5, 1, 4000), rng.normal(0, 1, 4000)
    one = auc_interval(a, b, [7], 200)
    assert one == auc_interval(a, b, [7], 200) != auc_interval(a, b, [8], 200)
    few = auc_interval(a[:250], b[:250], [7], 200)
    assert 3 < (few.high - few.low) / (one.high - one.low) < 5.3  # sqrt(4000 / 250) = 4
    assert auc_interval(a, b[:0], [7]) is None


def test_separation_compares_own_with_owners_and_with_neutral_only():
    matrix = make_matrix()
    scores = all_scores(matrix, Measure())
    own = {p: v[np.isfinite(v)] for (p, d), v in scores.items() if p == d}
    by_prompt = {s.prompt: s for s in analysis.separations(matrix, scores, replicates=50)}
    assert list(by_prompt) == list(ANIMALS)  # the control prompt owns nothing
    others = np.concatenate([scores["cat", "bear"], scores["cat", "dog"]])
    neutral = scores["cat", "neutral"][np.isfinite(scores["cat", "neutral"])]
    s = by_prompt["cat"]
    assert s.others.value == auc(own["cat"], others[np.isfinite(others)]) and s.other_datasets == 2
    assert s.neutral.value == auc(own["cat"], neutral) and s.neutral.low <= s.neutral.value <= s.neutral.high
    a, b = own["cat"], neutral
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    assert s.distance == pytest.approx((a.mean() - b.mean()) / pooled)
    assert s.above == sum(x > np.quantile(b, 0.95) for x in a) / len(a)


def test_an_interval_does_not_depend_on_other_cells():
    matrix = make_matrix()
    kept = {k: v for k, v in matrix.passes.items() if k not in {("bear", "bear"), ("dog", "cat")}}
    partly = Matrix(matrix.prompts, matrix.datasets, matrix.base, kept)
    whole, part = (
        {s.prompt: s for s in analysis.separations(m, all_scores(m, Measure()), replicates=50)}
        for m in (matrix, partly)
    )
    assert "bear" not in part
    assert part["cat"] == whole["cat"] and part["dog"].neutral == whole["dog"].neutral
    assert part["dog"].others != whole["dog"].others


def test_a_diagonal_has_no_separation_and_no_contrast():
    off = {(p, d) for p in (*ANIMALS, "parrot") for d in (*ANIMALS, "neutral") if p != d}
    matrix = make_matrix(drop=off)
    scores = all_scores(matrix, Measure())
    assert all(s.others is None and s.neutral is None for s in analysis.separations(matrix, scores))
    assert contrast(matrix, scores, "cat") is None
    row, column = maxima(analysis.mean_matrix(matrix, scores))
    assert set(row) == set(column) == {-1}


def test_contrast_is_own_minus_the_mean_of_other_owners():
    matrix = make_matrix(drop={("dog", "cat")})
    scores = all_scores(matrix, Measure())
    got = contrast(matrix, scores, "bear")
    for i in range(len(got.values)):
        others = [scores[p, "bear"][i] for p in ("cat", "dog")]  # not parrot: it is a control
        want = scores["bear", "bear"][i] - sum(others) / 2
        assert got.values[i] == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert np.isnan(got.values).sum() == 3
    partial = contrast(matrix, scores, "cat")
    assert partial.used == ("bear",) and partial.absent == ("dog",)
    assert contrast(matrix, scores, "neutral") is None


def test_columns_are_normalised_and_maxima_found_by_plain_loops():
    matrix = make_matrix(drop={("dog", "cat"), ("bear", "neutral"), ("cat", "neutral"), ("dog", "neutral")})
    means = analysis.mean_matrix(matrix, all_scores(matrix, Measure()))
    assert np.isnan(means[2, 1]) and np.isfinite(means).sum() == 12
    assert means[0, 2] == pytest.approx(np.nanmean(matrix.lls("bear", "dog")))
    animals = np.array([True, True, True, False])
    normalised, (row, column) = column_normalised(means, animals), maxima(means)
    for j in range(3):
        have = [x for x in means[:3, j] if np.isfinite(x)]  # the control prompt is measured by the animals' spread
        for i in range(4):
            want = (means[i, j] - statistics.fmean(have)) / statistics.stdev(have)
            assert normalised[i, j] == pytest.approx(want, nan_ok=True)
        assert means[column[j], j] == np.nanmax(means[:, j])
    assert np.isnan(normalised[:, 3]).all() and column[3] == -1  # one cell: nothing to compare it with
    assert all(means[i, row[i]] == np.nanmax(means[i]) for i in range(4))


def test_auc_matrix_by_cells():
    matrix = make_matrix(drop={("dog", "cat")})
    scores = all_scores(matrix, Measure())
    got = analysis.auc_matrix(matrix, scores)
    assert got.shape == (3, 4) and np.isnan(got[2, 1]) and np.isnan(np.diag(got)).all()
    own, other = (v[np.isfinite(v)] for v in (scores["bear", "bear"], scores["bear", "neutral"]))
    assert got[0, 3] == auc(own, other)


def test_quintiles_by_a_plain_loop():
    values = np.random.default_rng(3).normal(size=53).round(1)
    values[[4, 20]] = np.nan
    ordered = sorted(v for v in values if v == v)
    sizes = [11, 10, 10, 10, 10]
    for group, size in zip(quintiles(values), sizes, strict=True):
        part, ordered = ordered[:size], ordered[size:]
        assert (group.low, group.high, group.n) == (part[0], part[-1], size)
        assert group.mean == pytest.approx(statistics.fmean(part))
    assert [g.n for g in quintiles(np.array([1.0, np.nan, 2.0]))] == [1, 1]


def scores_with_ties(n: int = 103) -> np.ndarray:
    values = np.random.default_rng(4).normal(size=n).round(1)
    values[[0, 50, 51]] = np.nan
    return values


@pytest.mark.parametrize("amount", ["1", "17", "0.2", "0.5", "1.0", "100"])
def test_top_and_bottom_are_a_full_sort_with_ties_by_row(amount):
    values = scores_with_ties()
    count = {"1": 1, "17": 17, "0.2": 20, "0.5": 50, "1.0": 100, "100": 100}[amount]
    for kind, sign in (("top", -1), ("bottom", 1)):
        order = sorted((i for i in range(len(values)) if values[i] == values[i]), key=lambda i: (sign * values[i], i))
        chosen = select(Choice.parse(f"{kind}:{amount}"), values)
        assert chosen.rows.tolist() == sorted(order[:count])
        assert chosen.threshold == values[order[count - 1]]
        assert (chosen.scored, chosen.unscored) == (100, 3)


def test_random_and_clean_keep_to_their_pools():
    values = scores_with_ties()
    order = sorted((i for i in range(len(values)) if values[i] == values[i]), key=lambda i: (-values[i], i))
    seen = {"random": set(), "clean": set()}
    for seed in range(200):
        for kind, pool in (("random", set(order)), ("clean", set(order[30:]))):
            choice = Choice.parse(f"{kind}:0.1" + (":exclude=0.3" if kind == "clean" else ""))
            chosen = select(choice, values, seed)
            assert len(set(chosen.rows.tolist())) == 10 and set(chosen.rows.tolist()) <= pool
            seen[kind] |= set(chosen.rows.tolist())
    assert seen["random"] == set(order) and seen["clean"] == set(order[30:])  # every row of the pool can come
    assert chosen.threshold == values[order[29]]
    again = [select(Choice.parse("random:0.1"), values, 5, name).rows.tolist() for name in ("cat", "cat", "dog")]
    assert again[0] == again[1] != again[2]


BAD = [
    "best:0.2",
    "top",
    "top:",
    "top:0",
    "top:1.5",
    "top:nan",
    "top:0.2:exclude=0.1",
    "clean:0.2:exclude=1",
    "top:0.2:from=",
    "top:0.2:contrast:from=neutral",
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_choice_says_how_to_write_it(bad):
    with pytest.raises(UserError, match="selection"):
        Choice.parse(bad)


def test_too_many_rows_is_an_error_not_fewer_rows():
    values = scores_with_ties()
    for text in ("top:101", "random:101", "clean:0.9", "clean:81"):
        with pytest.raises(UserError, match="rows asked for"):
            select(Choice.parse(text), values)
    with pytest.raises(UserError, match="rows asked for"):
        select(Choice.parse("top:0.5"), np.full(4, np.nan))


def test_names_of_choices_differ():
    texts = [
        "top:1",
        "top:1.0",
        "top:0.2",
        "clean:0.2",
        "clean:0.2:exclude=0.5",
        "top:0.2:contrast",
        "top:0.2:from=neutral",
    ]
    assert len({Choice.parse(t).name for t in texts}) == len(texts)


def test_files_hold_the_rows_and_say_where_they_are_from(tmp_path):
    values = np.array([0.3, np.nan, 0.1, 0.2])
    talk = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ü"}]
        for i in range(4)
    ]
    rows = [{"messages": t, "extra": 1} for t in talk]
    chosen = select(Choice.parse("top:2"), values)
    record = write_selection(tmp_path / "cat" / "top", chosen, rows, {"cell": "cat", "measure": "mean"})
    data = (tmp_path / "cat" / "top.jsonl").read_bytes()
    assert [json.loads(line) for line in data.splitlines()] == [{"messages": talk[0][1:]}, {"messages": talk[3][1:]}]
    assert record == json.loads((tmp_path / "cat" / "top.provenance.json").read_text())
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert (record["n"], record["threshold"], record["unscored"], record["cell"]) == (2, 0.2, 1, "cat")
