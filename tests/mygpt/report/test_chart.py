"""What a chart draws lies where the values say, and can be read without seeing it."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.report.chart import HEIGHT, MAX_POINTS, WIDTH, Axis, Line, chart, short, ticks

NUMBERS = st.floats(1e-9, 1e12)


def points(html: str, kind: str) -> list[tuple[float, float]]:
    match = re.search(rf'<polyline class="\w+ {kind}" points="([^"]*)"', html)
    assert match
    return [tuple(map(float, pair.split(","))) for pair in match[1].split()]  # type: ignore[misc]


@given(NUMBERS, NUMBERS, st.booleans())
def test_ticks_are_few_round_and_inside(a: float, b: float, is_log: bool) -> None:
    low, high = min(a, b), max(a, b)
    axis = Axis(low, high * 1.05 + 1e-9, is_log)
    found = ticks(axis, 4)
    assert 2 <= len(found) <= 16
    assert found == sorted(set(found))
    assert all(-1e-9 <= axis.fraction(tick) <= 1 + 1e-9 for tick in found if tick > 0)


def test_a_line_goes_through_its_values() -> None:
    html = chart("Rate", "", [Line("rate", "first", {0: 0.0, 50: 100.0, 100: 25.0})])
    (x0, y0), (x1, y1), (x2, y2) = points(html, "line")
    assert (x0, x1, x2) == (0, WIDTH / 2, WIDTH)
    assert y0 == HEIGHT
    assert y1 == pytest.approx(HEIGHT * 0.06 / 1.06, abs=0.1)
    assert (HEIGHT - y2) / (HEIGHT - y1) == pytest.approx(0.25, abs=0.001)


def test_on_a_logarithmic_axis_equal_ratios_are_equal_heights() -> None:
    values = {1: 8.0, 2: 4.0, 3: 2.0}
    heights = [
        y for _, y in points(chart("x", "", [Line("a", "first", values)], is_log=True), "line")
    ]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_what_is_no_number_is_left_out() -> None:
    values = {1: 1.0, 2: math.nan, 3: math.inf, 4: 0.0, 5: 2.0}
    assert len(points(chart("x", "", [Line("a", "first", values)]), "line")) == 3
    assert len(points(chart("x", "", [Line("a", "first", values)], is_log=True), "line")) == 2
    assert "Not in the log." in chart("x", "", [Line("a", "first", {1: math.nan})])


def test_one_value_is_enough() -> None:
    assert len(points(chart("x", "", [Line("a", "first", {7: 3.5})]), "line")) == 1
    assert len(points(chart("x", "", [Line("a", "first", {0: 0.0})]), "line")) == 1


def test_a_long_series_is_thinned_without_losing_its_spikes() -> None:
    values = dict.fromkeys(range(1, 50001), 1.0) | {33_333: 9.0}
    html = chart("x", "", [Line("a", "first", values, "smoothed")])
    assert len(points(html, "line")) == MAX_POINTS
    assert min(y for _, y in points(html, "raw")) == pytest.approx(HEIGHT * 0.03, rel=1)
    assert len(html) < 60_000


def test_it_is_told_in_words_and_escaped() -> None:
    lines = [Line("a < b", "first", {1: 3.0, 9: 2.0}), Line("base", "quiet", {0: 4.0}, "level")]
    html = chart("<Loss>", "", lines, marks={5: 'loss is "nan"'})
    assert 'role="img"' in html
    assert "&lt;Loss&gt;. a &lt; b: from 3 to 2 at step 9, lowest 2; base: 4." in html
    assert "<title>loss is &quot;nan&quot;</title>" in html
    assert "skipped step" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.002, "0.002"), (6e-5, "6e-05"), (950, "950"), (1500, "1.5k"), (2e10, "20B")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
