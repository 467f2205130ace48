"""The LLS report: its figures in a real browser against the arrays, missing as missing, nothing from elsewhere."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, table
from lls_matrices import ANIMALS, make_matrix
from matplotlib.image import imread

from lib.lls import report_bars, report_plots
from lib.lls.analysis import all_scores, auc, contrast, finite
from lib.lls.matrix import Measure, Rescored
from lib.lls.report_sections import About, write_report
from lib.lls.report_tables import find
from lib.lls.token_view import TokenRow, places
from lib.report import heat as report_heat

HOLES = {("dog", "cat"), ("bear", "neutral")}
NASTY = '</title><script>document.title = "broken"</script><img src=x onerror="alert(1)">'
DIGEST = "5f" * 32


def make_report(folder: Path, **how):
    matrix = make_matrix(**{"drop": HOLES, "noise": True, **how})
    f = find(matrix, Measure(), replicates=60)
    rows = [
        TokenRow("cat", place, row, float(f.scores["cat", "cat"][row]), NASTY, [f"<b>{i}" for i in range(len(s))], s)
        for place, row in places(f.scores["cat", "cat"])
        if (s := matrix.shifts("cat", "cat", row)) is not None
    ]
    about = About(f"LLS {NASTY}", {"digest": DIGEST, "computed": "until 2026-01-01 00:00 UTC"})
    write_report(folder, about, f, rows)
    return f


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as box:
        yield box


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, make_report(folder)


@pytest.fixture()
def page(browser, report):
    browser.open(report[0] / "index.html")
    return browser


def test_the_page_opens_without_a_complaint_and_loads_nothing_but_its_own_pictures(page, report):
    assert page.errors == []
    pictures = page.js("[...document.images].map(i => [i.getAttribute('src'), i.naturalWidth, i.naturalHeight, i.alt])")
    assert {p[0] for p in pictures} == {p.name for p in report[0].glob("*.png")}
    assert all(p[1:3] == [2100, 1200] and p[3] for p in pictures)
    assert {url for url in page.requests if not url.startswith((report[0].as_uri() + "/", "data:"))} == set()


def test_text_from_data_stays_text(page):
    assert page.js("document.title") == page.js("document.querySelector('h1').innerText") == f"LLS {NASTY}"
    assert page.js("document.scripts.length") == 0
    assert NASTY in page.js("document.querySelector('.prompt').textContent")
    assert page.js("document.querySelector('.token b').textContent") == "<b>0"


def test_figures_of_the_page_are_the_arrays(page, report):
    m = report[1].matrix
    scores = all_scores(m, Measure())
    own = {row[0]: row[1:] for row in table(page, "own")}
    for name in ANIMALS:
        values = [v for v in m.lls(name, name).tolist() if v == v]
        mean = math.fsum(values) / len(values)
        sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert own[name][:2] == [len(values), 3]
        assert own[name][2] == pytest.approx(mean, abs=1e-12)
        half = 1.959964 * sd / math.sqrt(len(values))
        assert own[name][3] == pytest.approx((mean - half, mean + half), abs=1e-12)
        assert own[name][4:6] == pytest.approx([sd, sum(v > 0 for v in values) / len(values)], abs=1e-12)
        others = np.concatenate([finite(scores[name, d]) for d in ANIMALS if d != name and (name, d) in scores])
        assert own[name][6] == pytest.approx(float(others.mean()), abs=1e-12)
        assert own[name][8] == pytest.approx(m.noise(name, name).sd)
    means = table(page, "means")
    assert [row[0] for row in means] == list(m.prompts)
    for row, prompt in zip(means, m.prompts, strict=True):
        for value, dataset in zip(row[1:], m.datasets, strict=True):
            if (prompt, dataset) in HOLES:
                assert value == "missing"
            else:
                assert value == pytest.approx(float(np.nanmean(m.lls(prompt, dataset))), abs=1e-12)
    separation = {row[0]: row[1:] for row in table(page, "separation")}
    others = np.concatenate([finite(scores["cat", d]) for d in ("bear", "dog")])
    assert separation["cat"][:2] == [len(others), auc(finite(scores["cat", "cat"]), others)]
    assert separation["bear"][4] == "missing" and separation["cat"][4] == auc(
        finite(scores["cat", "cat"]), finite(scores["cat", "neutral"])
    )
    contrasts = {row[0]: row[1:] for row in table(page, "contrast")}
    for name in ANIMALS:
        c = contrast(m, scores, name)
        assert contrasts[name][1] == pytest.approx(float(np.nanmean(c.values)), abs=1e-12)
        assert contrasts[name][4:] == [len(c.used), len(c.absent)]
    assert contrasts["cat"][5] == 1
    quintiles = {row[0]: row[1:] for row in table(page, "quintiles")}
    ordered = sorted(v for v in scores["dog", "dog"] if v == v)
    assert quintiles["dog"][2] == (ordered[0], ordered[11]) and quintiles["dog"][10] == (ordered[-11], ordered[-1])
    assert table(page, "missing") == [["bear", 1.0, "neutral"], ["dog", 1.0, "cat"]]


def test_every_token_carries_its_value(page, report):
    m, f = report[1].matrix, report[1]
    want = [m.shifts("cat", "cat", row).tolist() for _, row in places(f.scores["cat", "cat"])]
    got = page.js(
        "[...document.querySelectorAll('.row')].map(r => [...r.querySelectorAll('i')].map(i => +i.dataset.v))"
    )
    assert got == want
    title, depth, text = page.js(
        "(t => [t.title, t.style.getPropertyValue('--depth'), t.querySelector('i').textContent])"
        "(document.querySelector('.token'))"
    )
    assert title == f"{want[0][0]:+.4f} nats" and text == f"{want[0][0]:+.2f}" and depth.endswith("%")


def test_light_dark_phone_and_paper(browser, report):
    ground = {}
    for dark in (False, True):
        browser.open(report[0] / "index.html", dark=dark)
        ground[dark] = browser.js(
            "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color"
        )
    assert ground[False] != ground[True]
    browser.open(report[0] / "index.html", width=390)
    assert browser.js("document.documentElement.scrollWidth") == 390  # wide tables scroll in their own boxes
    assert browser.js("document.querySelector('.scroll').scrollWidth") > 390
    browser.open(report[0] / "index.html", printed=True)
    assert browser.js("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_same_results_give_the_same_bytes(report, tmp_path):
    make_report(tmp_path)
    names = sorted(p.name for p in report[0].iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (report[0] / name).read_bytes(), name


def test_pictures_are_slides(report):
    for path in report[0].glob("*.png"):
        pixels = imread(path)
        assert pixels.shape[:2] == (1200, 2100), path.name
        edge = np.concatenate([pixels[:6].reshape(-1, pixels.shape[2]), pixels[-6:].reshape(-1, pixels.shape[2])])
        sides = np.concatenate(
            [pixels[:, :6].reshape(-1, pixels.shape[2]), pixels[:, -6:].reshape(-1, pixels.shape[2])]
        )
        assert edge.min() == sides.min() == 1, f"{path.name} is cut off at its edge"


def test_plain_text_has_the_same_tables(report):
    text, f = (report[0] / "report.txt").read_text(), report[1]
    assert DIGEST in text and "2026-01-01" in text
    means = text.partition("Mean LLS, prompt by dataset\n")[2].splitlines()[1:5]
    for line, prompt, row in zip(means, f.matrix.prompts, f.means, strict=True):
        words = line.replace("v", "").replace(">", "").split()
        assert words == [prompt, *("missing" if x != x else f"{x:+.4f}" for x in row)]
    assert "cat, highest: row" in text


@pytest.fixture()
def figures(monkeypatch):
    """Figures as they are saved, by file name."""
    kept = {}
    for module in (report_plots, report_bars, report_heat):
        monkeypatch.setattr(module, "save", lambda figure, path: kept.update({path.name: figure}))
    monkeypatch.setattr("lib.lls.report_sections.write_bytes", lambda path, data: None)
    return kept


def test_heat_maps_write_every_cell_and_colour_none_that_is_missing(figures, tmp_path):
    f = make_report(tmp_path)
    ax = figures["heat_mean.png"].axes[0]
    cells = [t for t in ax.texts if t.get_transform() == ax.transData]
    said = {tuple(map(round, t.get_position()[::-1])): t.get_text() for t in cells}
    for (i, j), value in np.ndenumerate(f.means):
        want = "missing" if math.isnan(value) else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
        assert said[i, j] == want
    hatched = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in ax.patches if p.get_hatch()}
    assert hatched == {(2, 1), (0, 3)}
    boxes = {(round(p.get_y() + 0.46), round(p.get_x() + 0.46)) for p in ax.patches if not p.get_fill()}
    assert boxes == {(int(np.nanargmax(f.means[:, j])), j) for j in range(4)}
    spots = [(line.get_ydata()[0], line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"]
    dots = {(round(y + 0.31), round(x - 0.36)) for y, x in spots}
    assert dots == {(i, int(np.nanargmax(f.means[i]))) for i in range(4)}


def test_bars_stand_where_the_numbers_are(figures, tmp_path):
    f = make_report(tmp_path)
    bars = [p.get_y() + p.get_height() for p in figures["auc.png"].axes[0].patches]
    assert bars == pytest.approx([e.value for s in f.separations for e in (s.others, s.neutral) if e])
    assert "missing" in [t.get_text() for t in figures["auc.png"].axes[0].texts]  # bear against neutral
    heights = [p.get_height() for p in figures["contrast.png"].axes[0].patches]
    assert heights == pytest.approx([float(np.nanmean(f.contrasts[d].values)) for d in ANIMALS])


def test_a_missing_own_cell_is_missing_everywhere(figures, tmp_path):
    make_report(tmp_path, drop={("bear", "bear")})
    for name in ("histograms.png", "auc.png", "contrast.png", "quintiles.png", "noise.png", "heat_mean.png"):
        texts = [t.get_text() for ax in figures[name].axes for t in ax.texts]
        assert "missing" in texts, name
    assert "histogram_bear.png" not in figures and "histogram_cat.png" in figures


def test_noise_of_any_size_finds_a_place(figures, tmp_path):
    matrix = make_matrix(noise=True)
    sample = matrix.rescored["cat", "cat"]
    exact = (matrix.passes["cat", "cat"].sums - matrix.base["cat"].sums)[sample.rows]
    none, tiny = Rescored(sample.rows, exact), Rescored(sample.rows, exact + 1e-7 * np.arange(len(exact)))
    for found, words in ((none, "no noise"), (tiny, "< 0.01 %")):
        f = find(replace(matrix, rescored={("cat", "cat"): found}), Measure("sum"), replicates=2)
        report_bars.noise_dots(f, tmp_path / "noise.png")
        texts = [t.get_text() for t in figures["noise.png"].axes[0].texts]
        assert words in texts and texts.count("not sampled") == 2 and "missing" not in texts
        dots = [line for line in figures["noise.png"].axes[0].lines if line.get_marker() == "o"]
        assert len(dots) == 3  # how far rows differ is known without a sample
        figures["noise.png"].canvas.draw()


def colours_of(ax) -> dict[tuple[int, int], tuple]:
    return {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)): p.get_facecolor() for p in ax.patches if p.get_fill()}


def test_the_auc_map_colours_every_column_and_its_scale_holds_them_all(figures, tmp_path):
    f = make_report(tmp_path, drop=())
    ax, bar = figures["heat_auc.png"].axes
    best = np.nanmax(f.pairs)
    assert best == np.nanmax(f.pairs[:, 3]) and bar.get_ylim()[1] >= best - 1e-9  # against neutral rows
    cells = colours_of(ax)
    order = [(i, 3) for i in np.argsort(f.pairs[:, 3])]
    assert cells[order[-1]][1] < cells[order[0]][1] < cells[0, 1][1]  # the higher, the less green in its red
    assert "Grey" not in ax.texts[-1].get_text()


@pytest.mark.parametrize("values, zero", [([[0.2, 0.3], [0.4, 0.1]], False), ([[0.2, -0.3], [0.4, 0.1]], True)])
def test_a_map_of_both_signs_shows_where_zero_is_and_another_says_that_it_does_not(figures, tmp_path, values, zero):
    heat = report_heat.Heat("t", "s", "LLS", ["a", "b"], ["a", "b"], np.array(values), "+.2f")
    report_heat.heat_map(heat, tmp_path / "heat.png")
    ax, bar = figures["heat.png"].axes
    assert ("0 lies outside" in bar.get_ylabel()) != zero
    lines = [line.get_ydata()[0] for line in bar.lines]
    assert lines == ([0.0] if zero else [])
    if zero:  # red above, blue below, as far from white as they are from zero
        cells = colours_of(ax)
        assert cells[0, 1][2] > cells[0, 1][0] and all(cells[at][0] > cells[at][2] for at in ((0, 0), (1, 0), (1, 1)))
        assert bar.get_ylim() == pytest.approx((-0.4, 0.4))


def test_a_scale_does_not_say_that_its_own_extreme_lies_beyond(figures, tmp_path):
    """0.5 + (v - 0.5) is not v for every v: not for 0.001."""
    for v in (0.99, 0.07, 0.9613, 0.001):
        norm, _ = report_heat._scale(0.5, np.array([v, 0.5]))
        assert report_heat._extend(norm, np.array([v, 0.5])) == "neither"
        assert report_heat._extend(norm, np.array([v, -2.0])) == "min"
