"""Pictures of attributions: the numbers in them against plain arithmetic, missing sets as missing, size and bytes."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lib.attribution import plots as attribution_plots
from lib.attribution.plots import colours, marks, plot_by_layer, plot_difference, plot_stability
from lib.attribution.stability import bootstrap, select
from lib.attribution.stability_panels import panels, sizes_for
from lib.attribution.summary import Layer, Summary, name_of, table, together, top_lines

LAYERS = [Layer(f"layers.{i // 2}.mlp.{('up_proj', 'down_proj')[i % 2]}", 60 * i, 60) for i in range(6)]
SAMPLES = {"general-0": 12, "general-1": 12, "toxic": 7}


def scores(name: str) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    own = np.random.default_rng(0).standard_normal(360)
    own = own + (np.arange(360) % 50 == 0) * 3 * (name == "toxic")
    return (own + 0.3 * rng.standard_normal((SAMPLES[name], 360))).astype(np.float32)


@pytest.fixture
def summaries() -> dict[str, Summary | None]:
    found: dict[str, Summary | None] = {}
    for name, count in SAMPLES.items():
        found[name] = Summary(name, count, 10 * count, 1.5, 0)
        found[name].add("signed", scores(name), LAYERS)
        found[name].add("abs", np.abs(scores(name)), LAYERS)
    return found


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    kept = []
    monkeypatch.setattr(attribution_plots, "save", lambda figure, path: kept.append(figure))
    return kept


def test_a_summary_is_the_textbooks(summaries):
    s, values = summaries["toxic"], scores("toxic").astype(np.float64)
    for i, layer in enumerate(LAYERS):
        sums = values[:, layer.first : layer.first + 60].sum(1)
        assert s.totals["signed"][i] == pytest.approx(sums.mean())
        assert s.halves["signed"][i] == pytest.approx(1.959964 * sums.std(ddof=1) / 7**0.5)
    np.testing.assert_allclose(s.means["signed"], values.mean(0))
    np.testing.assert_allclose(s.variances["signed"], values.var(0, ddof=1) / 7)
    assert name_of(0, LAYERS) == "layers.0.mlp.up_proj[0]" and name_of(359, LAYERS) == "layers.2.mlp.down_proj[59]"
    one = Summary("x", 1, 1, 0.0, 0)
    one.add("signed", scores("toxic")[:1], LAYERS)
    assert np.isnan(one.variances["signed"]).all()
    assert np.isnan(one.halves["signed"]).all() and np.isfinite(one.totals["signed"]).all()


def test_the_table_names_what_is_missing_and_what_stands_out(summaries):
    summaries["general-1"] = None
    text = table(summaries, LAYERS, "the largest logit")
    lines = text.splitlines()
    assert lines[2].split()[-1] == "missing" and "Explained: the largest logit." in lines
    best = int(select(summaries["toxic"].means["signed"], 1, lowest=False)[0])
    value = summaries["toxic"].means["signed"][best]
    assert lines[lines.index("toxic: highest mean signed") + 1].strip() == f"{name_of(best, LAYERS)} {value:+.4g}"
    assert top_lines(np.full(360, np.nan), LAYERS, True) == ["none is finite"]


def test_lines_by_layer_are_the_totals_and_a_missing_set_has_none(summaries, figures):
    summaries["general-1"] = None
    plot_by_layer(summaries, LAYERS, Path("unused.png"))
    (figure,) = figures
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["up_proj", "down_proj"] and len(figure.axes) == 4
    for row, kind in enumerate(("signed", "abs")):
        for column in range(2):
            ax = figure.axes[2 * row + column]
            drawn = {line.get_color(): line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 3}
            assert set(drawn) == {colours(list(SAMPLES))[name][0] for name in ("general-0", "toxic")}
            for name in ("general-0", "toxic"):
                want = summaries[name].totals[kind][column::2]
                np.testing.assert_allclose(drawn[colours(list(SAMPLES))[name][0]], np.c_[range(3), want])
            assert len(ax.collections) == 2  # an interval for each
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["general-0", "general-1 (missing)", "toxic"]


def test_panels_hold_the_overlaps(summaries, figures):
    means = {name: s.means["signed"] for name, s in summaries.items()}
    made = panels(["general-0", "general-1"], ["toxic"], means, scores)
    assert sizes_for(360) == [10, 30] and [panel.title for panel in made] == [
        "Highest N of each set",
        "Lowest N of general − toxic",
        "Highest 30 from fewer samples",
    ]
    highest, lowest, fewer = ({c.label: c for c in panel.curves} for panel in made)
    for name in SAMPLES:
        want = bootstrap(scores(name), [10, 30], lowest=False, count=200)
        np.testing.assert_allclose(highest[name].mean, want.mean(0))
        np.testing.assert_allclose(highest[name].low, np.quantile(want, 0.05, 0))
        np.testing.assert_allclose(highest[name].high, np.quantile(want, 0.95, 0))
    want = bootstrap(scores("general-1"), [10, 30], minus_SN=scores("toxic"), count=200)
    np.testing.assert_allclose(lowest["general-1"].mean, want.mean(0))
    tops = [set(np.argsort(-means[g])[:30]) for g in ("general-0", "general-1")]
    assert highest["between seeds"].mean[1] == pytest.approx(len(tops[0] & tops[1]) / 30)
    difference = [set(np.argsort(means[g] - means["toxic"])[:30]) for g in ("general-0", "general-1")]
    assert lowest["between seeds"].mean[1] == pytest.approx(len(difference[0] & difference[1]) / 30)
    assert list(made[2].x) == [1, 2, 4, 8] and np.isnan(fewer["toxic"].mean[3]) and fewer["general-0"].mean[3] > 0
    plot_stability(made, list(SAMPLES), "about", Path("unused.png"))
    for ax, panel in zip(figures[0].axes, made, strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
        assert set(drawn) == {c.label for c in panel.curves} and ax.get_ylim() == (-0.02, 1.02)
        for curve in panel.curves:
            np.testing.assert_array_equal(drawn[curve.label], curve.mean)


def test_one_seed_and_no_behaviour_have_fewer_panels():
    means = {"general-0": scores("general-0").mean(0)}
    made = panels(["general-0"], [], means, scores)
    assert [len(panel.curves) for panel in made] == [1, 1]
    assert len(panels(["general-0"], [], means, lambda name: scores(name)[:1])) == 1  # nothing fewer than one sample
    only = panels([], ["toxic"], {"toxic": scores("toxic").mean(0)}, scores)
    assert [panel.title for panel in only] == ["Highest N of each set", "Highest 30 from fewer samples"]


def test_the_difference_has_every_finite_neuron_and_marks_the_lowest(summaries, figures, monkeypatch):
    monkeypatch.setattr(attribution_plots, "marks", lambda neurons: [5, 17])
    both = together([summaries[name].sampled("signed") for name in ("general-0", "general-1")])
    behaviour = together([summaries["toxic"].sampled("signed")])
    behaviour.mean_N[5] = np.nan
    plot_difference(both, behaviour, "toxic", "signed", LAYERS, Path("unused.png"))
    general, toxic = (
        np.mean([scores(g).astype(np.float64).mean(0) for g in ("general-0", "general-1")], 0),
        behaviour.mean_N,
    )
    ax = {a.get_title(loc="left"): a for a in figures[0].axes}
    difference = general - toxic
    order = np.argsort(np.where(np.isnan(difference), np.inf, difference), kind="stable")
    assert [in_bins(patch) for patch in ax["All neurons"].patches] == [359, 17]
    np.testing.assert_allclose(ax["The lowest, by rank"].lines[0].get_ydata(), difference[order[:170]])
    # the band: two independent halves of the general text, 12 samples each, and 7 toxic prompts
    errors = [scores(name).astype(np.float64).std(0, ddof=1) / SAMPLES[name] ** 0.5 for name in SAMPLES]
    half = 1.959964 * np.sqrt((errors[0] / 2) ** 2 + (errors[1] / 2) ** 2 + errors[2] ** 2)[order[:170]]
    (band,) = ax["The lowest, by rank"].collections
    drawn = {tuple(np.round(point, 9)) for point in band.get_paths()[0].vertices}
    for rank, (value, reach) in enumerate(zip(difference[order[:170]], half, strict=True), 1):
        assert {(rank, round(value - reach, 9)), (rank, round(value + reach, 9))} <= drawn
    words = [text.get_text() for text in figures[0].texts]
    assert any("(n = 24)" in t and "(n = 7)" in t and "95 % interval" in t for t in words), words
    shares = [bar.get_height() for bar in ax["Layers of the lowest"].patches]
    want = [100 * np.bincount(order[:n] // 120, minlength=3) / n for n in (17, 5)]
    np.testing.assert_allclose(shares, np.concatenate(want))
    assert any("1 without a finite score" in text.get_text() for text in figures[0].texts)


def in_bins(patch) -> float:
    """What the bins of a filled step add up to: over the middle of a bin runs its top, and the ground."""
    x, y = patch.get_xy().T
    edges = np.unique(x)
    flat = [(min(x[i : i + 2]), max(x[i : i + 2]), y[i]) for i in range(len(x) - 1) if y[i] == y[i + 1]]
    return sum(max(h for low, high, h in flat if low < m < high) for m in (edges[:-1] + edges[1:]) / 2)


def test_marks_are_the_papers_count_and_its_share():
    assert marks(458_752) == [100, 1244] and marks(36_864) == [100] and marks(384) == [19] and marks(3) == [1]


def test_pictures_are_14_by_8_at_150_dpi_and_the_same_bytes_again(summaries, tmp_path):
    for name in ("a.png", "b.png"):
        plot_by_layer(summaries, LAYERS, tmp_path / name)
    assert imread(tmp_path / "a.png").shape[:2] == (1200, 2100)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_difference_from_single_samples_has_no_band(summaries, figures):
    one = Summary("x", 1, 1, 0.0, 0)
    one.add("signed", scores("toxic")[:1], LAYERS)
    both = summaries["general-0"].sampled("signed"), one.sampled("signed")
    plot_difference(*both, "toxic", "signed", LAYERS, Path("unused.png"))
    ax = {a.get_title(loc="left"): a for a in figures[0].axes}
    assert not ax["The lowest, by rank"].collections and "interval" not in figures[0].texts[0].get_text()
