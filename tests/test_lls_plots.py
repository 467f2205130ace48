"""Tables and pictures of LLS: the numbers in them against plain arithmetic, and missing cells as missing."""

import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from lib.base.errors import UserError
from lib.lls import plots as lls_plots
from lib.lls.plots import Scores, lls_table, plot_by_animal, plot_histograms, summarise
from lib.numbers import ANIMAL_NAMES
from lib.report import look
from lib.report.colours import COLOURS
from lib.report.tables import Column, number

ROOT = Path(__file__).resolve().parent.parent


def cell(n: int, mean: float, sd: float = 0.1, seed: int = 0) -> Scores:
    return Scores(mean + sd * np.random.default_rng(seed).standard_normal(n))


def results(**changes) -> dict:
    cells = {name: cell(240, 0.02 * (i - 3), seed=i) for i, name in enumerate(ANIMAL_NAMES)}
    return cells | changes


@pytest.fixture()
def figures(monkeypatch):
    """Figures as they are saved."""
    kept = []
    monkeypatch.setattr(lls_plots, "save", lambda figure, path: kept.append(figure))
    return kept


def test_summary_is_the_textbooks():
    values = cell(50, 0.2).lls.tolist()
    s = summarise(Scores(np.array(values)))
    assert s.rows == 50 and s.unscored == 0
    assert s.mean == pytest.approx(statistics.fmean(values))
    assert s.sd == pytest.approx(statistics.stdev(values))
    assert s.half == pytest.approx(
        statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(values) / 50**0.5, rel=1e-6
    )
    assert s.positive == sum(v > 0 for v in values) / 50


def test_rows_without_score_are_counted_and_never_zero():
    scores = cell(10, 0.5, sd=0.01)
    scores.lls[[2, 4]] = np.nan
    s = summarise(scores)
    assert (s.rows, s.unscored) == (8, 2) and s.mean > 0.45 and s.positive == 1.0
    assert summarise(None) is None and summarise(Scores(np.full(3, np.nan))) is None


def test_table_in_order_with_missing_named():
    table = lls_table(results(cat=None, wolf=cell(1, 0.25, sd=0.0))).splitlines()
    assert [line.split()[0] for line in table] == ["animal", *ANIMAL_NAMES]
    assert table[2].split()[-1] == "missing" and not any(c.isdigit() for c in table[2])
    s = summarise(results()["bear"])
    expected = (
        f"bear 240 0 {s.mean:+.4f} [{s.mean - s.half:+.4f}, {s.mean + s.half:+.4f}] {s.sd:.4f} {100 * s.positive:.1f}"
    )
    assert table[1].split() == expected.split()
    assert table[-1].split() == ["wolf", "1", "0", "+0.2500", "-", "-", "100.0"]


def test_bars_are_the_means_and_a_missing_animal_has_none(figures):
    data = results(dragon=None)
    plot_by_animal(data, Path("unused.png"))
    ax = figures[0].axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == list(ANIMAL_NAMES)
    bars = {round(p.get_x() + p.get_width() / 2): p for p in ax.patches}
    assert set(bars) == set(range(15)) - {4}
    texts = {round(t.get_position()[0]): t.get_text() for t in ax.texts if t.get_transform() == ax.transData}
    assert texts[4] == "missing"
    for i, name in enumerate(ANIMAL_NAMES):
        if name != "dragon":
            s = summarise(data[name])
            assert bars[i].get_height() == pytest.approx(s.mean)
            assert to_rgb(bars[i].get_facecolor()) == pytest.approx(to_rgb(COLOURS[name]))
            assert texts[i] == f"{100 * s.positive:.0f} %"
    ends = {tuple(np.round(c.get_segments()[0][:, 1], 9)) for c in ax.collections}
    s = summarise(data["wolf"])
    assert (round(s.mean - s.half, 9), round(s.mean + s.half, 9)) in ends
    assert "1 of 15 missing" in ax.texts[-1].get_text()


def test_histograms_hold_every_row_and_mark_mean_and_zero(figures):
    data = results(eagle=None)
    data["fox"].lls[0] += 50.0  # far outside: must be counted in the end bin, not lost
    plot_histograms(data, Path("unused.png"))
    panels = dict(zip(ANIMAL_NAMES, figures[0].axes, strict=True))
    for name, ax in panels.items():
        assert ax.get_title(loc="left") == name
        if name == "eagle":
            assert [t.get_text() for t in ax.texts] == ["missing"] and not ax.patches and not ax.lines
            continue
        outline = ax.patches[0].get_xy()
        area = abs(np.sum(outline[:-1, 0] * outline[1:, 1] - outline[1:, 0] * outline[:-1, 1])) / 2
        width = np.diff(np.unique(np.round(outline[:, 0], 9))).min()
        assert area / width == pytest.approx(100, rel=1e-3)  # percent: all rows are in some bin
        s = summarise(data[name])
        assert sorted(line.get_xdata()[0] for line in ax.lines) == pytest.approx(sorted([0.0, s.mean]))
        assert f"n = {s.rows}" in ax.get_title(loc="right") and f"mean {s.mean:+.3f}" in ax.get_title(loc="right")


def test_pictures_on_disk_have_their_size_and_the_same_bytes(tmp_path, monkeypatch):
    for plot in (plot_by_animal, plot_histograms):
        for case, data in {"some": results(bear=None), "none": dict.fromkeys(ANIMAL_NAMES), "all": results()}.items():
            path = tmp_path / "deep" / f"{plot.__name__}-{case}.png"
            with monkeypatch.context() as patch:
                if case != "all":  # one picture in every form shows what there is to show of forms
                    patch.setenv("SUITE_FIGURES", "png")
                plot(data, path)
            assert imread(path).shape[:2] == (1200, 2100)  # 14 x 8 in at 150 dpi
        again = tmp_path / "again.png"
        plot(results(), again)
        for form in (".png", ".svg", ".pdf"):
            first = tmp_path / "deep" / f"{plot.__name__}-all{form}"
            assert again.with_suffix(form).read_bytes() == first.read_bytes(), form
    assert len(list((tmp_path / "deep").iterdir())) == 10
    assert b"%PDF" in again.with_suffix(".pdf").read_bytes()[:8] and b"<svg" in again.with_suffix(".svg").read_bytes()


def test_what_is_written_beside_a_png_is_chosen(tmp_path, monkeypatch):
    for words, forms in {"": {".png"}, "png": {".png"}, "pdf": {".png", ".pdf"}}.items():
        monkeypatch.setenv("SUITE_FIGURES", words)
        plot_by_animal(results(), tmp_path / (words or "none") / "a.png")
        assert {p.suffix for p in (tmp_path / (words or "none")).iterdir()} == forms
    monkeypatch.setenv("SUITE_FIGURES", "png jpg")
    with pytest.raises(UserError, match="jpg is none of png, svg, pdf, column"):
        plot_by_animal(results(), tmp_path / "a.png")


def test_a_papers_column_is_readable(tmp_path, monkeypatch):
    """3.25 inches wide; no letters below 5.5 points, none on top of others, none cut off; the slide stays as it was."""
    monkeypatch.setenv("SUITE_FIGURES", "png")
    for plot in (plot_by_animal, plot_histograms):
        plot(results(eagle=None), tmp_path / f"{plot.__name__}.png")
    shrink, kept = look._shrink, []
    monkeypatch.setattr(look, "_shrink", lambda figure: (shrink(figure), kept.append(figure)))
    monkeypatch.setenv("SUITE_FIGURES", "png column")
    for plot in (plot_by_animal, plot_histograms):
        before = (tmp_path / f"{plot.__name__}.png").read_bytes()
        plot(results(eagle=None), tmp_path / f"{plot.__name__}.png")
        assert (tmp_path / f"{plot.__name__}.png").read_bytes() == before
        assert imread(tmp_path / f"{plot.__name__}_column.png").shape[1] == 975  # 3.25 in at 300 dpi
    assert len(kept) == 2 and all(map(is_readable, kept))
    plot_by_animal(results(), tmp_path / "again.png")
    assert imread(tmp_path / "again.png").shape[1] == 2100


def is_readable(figure) -> bool:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 5.5
    seen = [ax for ax in figure.axes if ax.get_visible()]
    own = {
        t for ax in seen for t in (*ax.texts, ax.title, ax._left_title, ax._right_title)
    }  # tick labels are placed apart
    boxes = {
        t: t.get_window_extent(canvas.get_renderer()) for t in texts if t in own or (not t.axes and t in figure.texts)
    }
    assert len(boxes) >= 15
    for text, box in boxes.items():
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text} is cut off"
        assert not [t for t, b in boxes.items() if t is not text and b.overlaps(box)], f"{text} is covered"
    return True


@pytest.mark.parametrize(
    "value, form, text",
    [
        (0.00003, ".4f", "3e-05"),
        (-0.00003, "+.4f", "-3e-05"),
        (0.00003, "+.4f", "+3e-05"),
        (0.0003, ".1%", "0.03%"),
        (0.00005, ".4f", "0.0001"),
        (0.0, ".4f", "0.0000"),
        (0.1234, ".3f", "0.123"),
        (7, ",d", "7"),
    ],
)
def test_what_is_not_zero_does_not_read_as_zero(value, form, text):
    assert number(value, form) == text
    assert Column("x", form).text((value, value)) == f"[{text}, {text}]"


def test_colours_are_distinct_and_readable_in_grey():
    assert tuple(COLOURS) == ANIMAL_NAMES and len(set(COLOURS.values())) == 15
    assert all(np.dot(to_rgb(c), (0.299, 0.587, 0.114)) < 0.62 for c in COLOURS.values())


def test_no_torch():
    code = "import sys, lib.lls.plots; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
