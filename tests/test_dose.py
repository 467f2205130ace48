"""The dose response as a figure and a table, from plain rates."""

import re

import pytest
from PIL import Image

from lib.lora.dose import difference, write_dose
from lib.report.stats import wilson


def rate(hits: int, n: int = 100) -> tuple[float, float, float]:
    return hits / n, *wilson(hits, n)


def test_the_dose_response_is_drawn_with_its_controls_and_what_is_missing_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_FIGURES", "png svg pdf")
    hits = {"q1": 22, "q2": 24, "q3": 44, "q4": 51, "q5": 100, "clean": 12}
    rates = {("14b", "eagle", part): rate(n) for part, n in hits.items()}
    rates |= {("14b", "lion", part): rate(0) for part in hits} | {("14b", "lion", "q5"): None}
    lines = {("14b", "eagle"): rate(28)}
    first = write_dose(rates, lines, {("14b", "eagle"): rate(12)}, tmp_path / "a")
    assert [path.name for path in first] == ["dose.txt", "dose_14b.png"]
    assert Image.open(first[1]).size == (2100, 1200)
    assert all((tmp_path / "a" / name).exists() for name in ("dose_14b.svg", "dose_14b.pdf"))
    svg = (tmp_path / "a" / "dose_14b.svg").read_text()
    assert all(f"<!-- {word} -->" in svg for word in ("eagle", "lion", "missing", "base", "neutral", "q5", "clean"))
    text = first[0].read_text()
    assert re.search(r"14b +lion +q5 +missing +-", text) and re.search(r"14b +eagle +base +28.0%", text)
    assert re.search(r"14b +lion +q5 - q1 +missing", text)
    monkeypatch.setenv("SUITE_FIGURES", "png")
    again = write_dose(rates, {}, {}, tmp_path / "b")
    assert again[1].read_bytes() != first[1].read_bytes(), "its lines are seen"


def test_a_difference_of_two_shares_is_newcombes():
    """His paper's table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/10."""
    for a, b, low, high in ((56, 48, 0.0524, 0.3339), (9, 3, 0.1705, 0.8090), (10, 0, 0.6075, 1.0)):
        n, m = (70, 80) if a > 10 else (10, 10)
        found = difference(rate(a, n), rate(b, m))
        assert found == pytest.approx((a / n - b / m, low, high), abs=1e-4)
    assert difference(None, rate(1)) is None
