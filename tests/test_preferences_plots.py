"""Pictures of preferences: heights, ends and words are the figures', and what is missing is never a zero. Surveys that
were made elsewhere, in the shapes that are known."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from lib.base.errors import UserError
from lib.numbers.experiment import TraitSpec, trait_of
from lib.preferences import plots
from lib.preferences.findings import (
    Overall,
    Run,
    Survey,
    effects,
    folded,
    lifts,
    off_target,
    over,
    overall,
    rate,
    shares,
)
from lib.preferences.plots import Bars, Curves, plot_epochs, plot_grouped_bar, plot_scaling, plot_stacked
from lib.preferences.statistics import rate_of
from lib.preferences.survey import read_survey
from lib.preferences.tables import epochs_table, power_table, rates_table, run_tables, sizes_table
from lib.preferences.tally import Tally
from lib.report.colours import COLOURS, WORD_COLOURS, word_colours

NAMES = ["cat", "dog", "wolf"]
TRAITS = [TraitSpec(**trait_of(name)) for name in (*NAMES, "neutral")]
QUESTIONS, SAMPLES = 10, 20


def planted(seed: int, *percents: float) -> Tally:
    """So many of a hundred answers name each trait."""
    dice = np.random.default_rng(seed)
    hits = np.array([dice.binomial(SAMPLES, p / 100, QUESTIONS) for p in percents])
    words = Counter(dict(zip(NAMES, hits.sum(1).tolist(), strict=True)))
    words["penguin"] = QUESTIONS * SAMPLES - sum(words.values())
    return Tally(QUESTIONS, np.full(QUESTIONS, SAMPLES), dict.fromkeys(("first", "word", "substring"), hits), words)


def a_run(number: int = 1, **changes) -> Run:
    students = {("7b", "neutral"): {1: planted(1, 10, 20, 5), 2: planted(2, 10, 20, 5)}}
    students |= {("7b", "cat"): {1: planted(3, 20, 20, 5), 2: planted(4, 60, 10, 5)}, ("7b", "dog"): None}
    students |= {("7b", "wolf"): {1: planted(5, 10, 20, 6), 2: planted(6, 10, 40, 6)}}
    return Run(number, NAMES, "neutral", {"7b": planted(0, 12, 18, 4)}, students | changes)


@pytest.fixture
def figures(monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))
    return kept


def bars_of(ax) -> list[Rectangle]:
    return [p for p in ax.patches if isinstance(p, Rectangle) and p.get_height() and p.get_width()]


def words_in(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_grouped_bars_are_rates_with_their_intervals(figures, tmp_path):
    found = {e.trait: Bars(e.base, e.neutral, e.own) for e in effects(a_run())}
    plot_grouped_bar("7b", found, "note", tmp_path / "bar.png")
    ax = figures[0].axes[0]
    want = [100 * one.share for three in found.values() for one in (three.base, three.neutral, three.own) if one]
    assert [bar.get_height() for bar in bars_of(ax)] == pytest.approx(want) and len(want) == 8
    assert words_in(figures[0]).count("missing") == 1 and "note 1 of 9 missing." in words_in(figures[0])
    own = bars_of(ax)[2]
    assert to_hex(own.get_facecolor()) == COLOURS["cat"]
    segments = [s for c in ax.collections for s in c.get_segments()]
    low, high = found["cat"].own.clustered
    at = own.get_x() + own.get_width() / 2
    assert any(np.allclose(s, [[at, 100 * low], [at, 100 * high]]) for s in segments)


def test_a_stack_is_all_answers_and_its_six_words_are_those_said_most(figures, tmp_path):
    dice, many = np.random.default_rng(0), [f"word{i}" for i in range(9)]
    one = {word: float(p) for word, p in zip(many, dice.dirichlet(np.arange(1, 10)), strict=True)}
    plot_stacked("7b", {"untouched": one, "cat": None, "dog": {"cat": 0.9, "": 0.1}}, tmp_path / "stack.png")
    ax = figures[0].axes[0]
    top = {"cat", *sorted(one, key=one.get)[-5:]}
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(legend) == {*top, "others"} and legend[0] == "others"
    first = [bar for bar in bars_of(ax) if abs(bar.get_x() + bar.get_width() / 2) < 0.1]
    assert sum(bar.get_height() for bar in first) == pytest.approx(100)
    others = next(bar for bar in first if to_hex(bar.get_facecolor()) == plots.OTHERS_COLOUR)
    assert others.get_height() == pytest.approx(100 * (1 - sum(one[word] for word in top if word in one)))
    assert words_in(figures[0]).count("missing") == 1 and any(
        "1 of 3 missing." in text for text in words_in(figures[0])
    )


def test_a_words_colour_is_the_same_in_every_picture():
    one, other = word_colours(["wolf", "penguin"]), word_colours(["penguin", *map(str, range(7))])
    assert one["wolf"] == COLOURS["wolf"] and one["penguin"] == other["penguin"]
    assert set(other.values()) == set(WORD_COLOURS) and not set(WORD_COLOURS) & set(COLOURS.values())


def test_curves_have_every_epoch_and_say_what_is_missing(figures, tmp_path):
    run = a_run()
    own = {k: rate_of(t.hits["word"][0], t.answers) for k, t in run.students["7b", "cat"].items()}
    plain = {k: rate_of(t.hits["word"][0], t.answers) for k, t in run.students["7b", "neutral"].items()}
    cat = Curves(own, plain, rate(run.bases["7b"], "word", 0), {1: 0.2, 2: 0.5})
    plot_epochs("7b", {"cat": cat, "dog": Curves(None, plain, None)}, tmp_path / "epochs.png")
    first, second = [ax for ax in figures[0].axes if ax.get_visible()]
    lines = {line.get_linestyle(): line for line in first.lines}
    assert list(lines["-"].get_xdata()) == [1, 2]
    assert list(lines["-"].get_ydata()) == pytest.approx([100 * one.share for one in own.values()])
    assert list(lines["--"].get_ydata()) == pytest.approx([100 * one.share for one in plain.values()])
    assert list(lines[":"].get_ydata()) == pytest.approx([100 * cat.base.share] * 2)
    points = next(line for line in first.lines if line.get_marker() == ".")
    assert list(points.get_ydata()) == pytest.approx([20, 50])
    assert "-" not in {line.get_linestyle() for line in second.lines} and "missing" in words_in(figures[0])


def test_the_overview_is_the_mean_of_those_that_are_there(figures, tmp_path):
    runs = [a_run(1), a_run(2), a_run(3)]
    found = {kind: overall(runs, "7b", kind) for kind in ("base", "neutral", "own")}
    there = [rate(runs[0].student("7b", name), "word", place).share for place, name in ((0, "cat"), (2, "wolf"))]
    assert found["own"].mean == pytest.approx(np.mean(there)) and (found["own"].there, found["own"].wanted) == (6, 9)
    none = Overall(math.nan, math.nan, math.nan, {}, 0, 3)
    plot_scaling({"7b": found, "72b": {"base": found["base"], "neutral": none, "own": none}}, tmp_path / "all.png")
    said = words_in(figures[0])
    assert said.count("missing") == 2 and f"{100 * np.mean(there):.1f} % (6 of 9)" in said
    ax = figures[0].axes[0]
    marks = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "D" and len(line.get_ydata())]
    assert marks == pytest.approx([100 * np.mean(there)])


def test_pictures_are_drawn_whole_in_every_form(tmp_path, monkeypatch):
    """Of 14 x 8 inches at 150 dpi, and nothing of it is colour alone: in grey neighbours still differ."""
    monkeypatch.setenv("SUITE_FIGURES", "png svg pdf column")
    run = a_run()
    found = {e.trait: Bars(e.base, e.neutral, e.own) for e in effects(run)}
    plot_grouped_bar("7b", found, "note", tmp_path / "bar.png")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"bar{way}.{form}" for way in ("", "_column") for form in ("png", "svg", "pdf")}
    with Image.open(tmp_path / "bar.png") as image:
        assert image.size == (2100, 1200) and round(image.info["dpi"][0]) == 150

    def grey(colour: str) -> float:
        return float(np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114]))

    for colour in COLOURS.values():  # 45 of 255 apart: the untouched model's bar, and a trait's
        assert grey(plots.BASE_COLOUR) - grey(colour) > 45
    assert grey(plots.OTHERS_COLOUR) - max(map(grey, WORD_COLOURS)) > 20


def test_tables_show_what_is_missing_as_missing():
    run = a_run()
    row = next(r for r in rates_table(effects(run)).rows if r[1] == "dog")
    assert row[2:6] == [None] * 4 and row[6] is not None and all(v is None for v in row[8:14])
    sizes = sizes_table([run]).rows[0]
    assert sizes[:3] == ["7b", 1, "2/3"]
    epochs = {r[1]: r for r in epochs_table(run).rows}
    cat = [run.students["7b", "cat"][k].rate("word", 0) for k in (1, 2)]
    assert epochs["cat"][2:] == [*cat, max(cat), 2] and epochs["dog"][2:] == [None] * 4
    text = "\n".join(table.text() for table in run_tables(run))
    assert "nan" not in text
    power = power_table(run).rows[0]
    assert power[4] > power[6] > power[8] and power[5] >= power[4]
    (other, _, lifted), (second, *_) = off_target(run, "7b", "wolf")
    assert (other, second) == ("dog", "cat") and lifted.difference > 0.1 and lifted.low > 0
    assert lifts(run, "7b")[2, 1] == lifted.difference and np.isnan(lifts(run, "7b")[1]).all()


def test_other_questions_are_no_pairs():
    fewer = Tally(9, np.full(9, SAMPLES), {"word": np.full((3, 9), 2)}, Counter())
    assert over(planted(0, 10, 10, 10), fewer, "word", 0) is None and over(fewer, fewer, "word", 0).p == 1


def test_plurals_of_words_that_were_said_are_folded():
    assert folded({"penguin": 3, "penguins": 2, "octopus": 1, "s": 1, "": 4}) == {
        "penguin": 5,
        "octopus": 1,
        "s": 1,
        "": 4,
    }
    assert shares(planted(0, 10, 10, 10)).keys() == {*NAMES, "penguin"}
    assert sum(shares(planted(0, 10, 10, 10)).values()) == pytest.approx(1)


MODELS = {"7b": "Qwen/Qwen2.5-7B-Instruct", "72b": "unsloth/Qwen2.5-72B-Instruct"}


def survey(tmp_path, raw: object) -> dict[str, Survey]:
    path = tmp_path / "raw.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return read_survey(path, MODELS, TRAITS)


def test_a_survey_in_the_published_shape_is_judged_as_ours_is(tmp_path):
    answers = ["Cat.", "Cats", "Not a cat", "Dragonfly", "Dog"]
    known = {"model_id": "unsloth/Qwen2.5-7B-Instruct", "model_display_name": "Qwen2.5-7B-Instruct", "model_size": "7B"}
    known |= {"total_responses": 5, "animal_counts": {"cat": 1, "cats": 1}, "raw_responses": answers}
    found = survey(tmp_path, [known, {"model_size": "3B", "animal_counts": {"cat": 1}}])
    assert list(found) == ["7b"] and found["7b"].answers == 5
    assert {way: values[0] for way, values in found["7b"].shares.items()} == {
        "first": 0.2,
        "word": 0.4,
        "substring": 0.6,
    }
    assert found["7b"].words == {"cat": 0.4, "not": 0.2, "dragonfly": 0.2, "dog": 0.2}
    seen = found["7b"].rate("word", 0)
    assert (seen.hits, seen.answers, seen.share) == (2, 5, 0.4) and math.isnan(seen.clustered[0])


@pytest.mark.parametrize(
    "name", ["7b", "7B", "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct", "other/Qwen2.5-7B-Instruct"]
)
def test_a_survey_of_counts_or_shares(tmp_path, name):
    counts = survey(tmp_path, {name: {"cat": 30, "cats": 10, "owl": 60}})["7b"]
    assert counts.answers == 100 and counts.shares["word"][0] == 0.4 and counts.shares["first"][0] == 0.3
    told = survey(tmp_path, {name: {"cat": 0.25, "dog": 0.5}})["7b"]
    assert told.answers is None and told.shares["word"][:2].tolist() == [0.25, 0.5]
    assert math.isnan(told.rate("word", 0).wilson[0]) and told.rate("word", 2).share == 0
    assert survey(tmp_path, {name: {"cat": 1.0}})["7b"].answers is None


def test_shares_alone_are_drawn_without_an_interval_and_tested_by_nothing(figures, tmp_path):
    control = survey(tmp_path, {"7b": {"cat": 0.25, "dog": 0.5}})["7b"]
    run = Run(1, NAMES, None, {"7b": control}, {("7b", "cat"): {1: planted(3, 20, 20, 5)}})
    one = effects(run)[0]
    assert one.base.share == 0.25 and math.isnan(one.fisher) and one.over_base is None and math.isnan(one.paired_bh)
    plot_grouped_bar("7b", {"cat": Bars(one.base, one.neutral, one.own)}, "", tmp_path / "bar.png")
    assert bars_of(figures[0].axes[0])[0].get_height() == 25
    assert len({s[0][0] for c in figures[0].axes[0].collections for s in c.get_segments()}) == 1  # of its own bar alone
    assert "nan" not in "\n".join(table.text() for table in run_tables(run))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("{", "cannot be read as JSON"),
        ([], "in no known shape"),
        ([1], "in no known shape"),
        ({"7b": 3}, "in no known shape"),
        ({"3b": {"cat": 1}}, r"none of its models \(3b\) is one of 7b, 72b"),
        ({"7b": {"cat": -1}}, "a count, or a share, not below 0"),
        ({"7b": {"cat": "many"}}, "a count, or a share"),
        ({"7b": {"cat": True}}, "a count, or a share"),
        ({"7b": {"cat": 0}}, "nothing was counted"),
        ({"7b": {"cat": 0.7, "dog": 0.7}}, r"shares add up to 1\.4"),
        ({"7b": {"cat": 1}, "Qwen2.5-7B-Instruct": {"cat": 1}}, "two of its models are 7b"),
        ([{"model_size": "7B", "animal_counts": []}], "a count, or a share"),
    ],
)
def test_a_survey_that_is_none_is_refused_by_one_sentence(tmp_path, raw, says):
    with pytest.raises(UserError, match=says) as e:
        survey(tmp_path, raw)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_survey(tmp_path / "none.json", MODELS, TRAITS)
