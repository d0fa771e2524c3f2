"""Charts of the report page as SVG."""

from __future__ import annotations

import math
import re

import pytest

from sdp_lightning.observability.report.charts import Line, area_chart, line_chart, thin
from support.reports import Page


def points(count: int) -> list[tuple[float, float]]:
    return [(float(i), float(i % 7)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 160, 161, 5000])
def test_a_chart_has_at_most_as_many_strips_as_it_can_show(count: int) -> None:
    for chart in (
        line_chart([Line("a", points(count))], name="n", x_label="x", y_label="y"),
        area_chart([Line("a", points(count))], name="n", x_label="x", y_label="y"),
    ):
        Page(chart)
        assert chart.count('class="hit"') == min(count, 160)


def test_thinning_keeps_the_mean() -> None:
    thinned = thin(points(700), 100)
    assert sum(y for _, y in thinned) / 100 == pytest.approx(sum(y for _, y in points(700)) / 700)


def test_a_chart_of_nothing_says_so() -> None:
    assert "nothing was logged" in line_chart([], name="n", x_label="x", y_label="y")
    assert "nothing was logged" in area_chart([], name="n", x_label="x", y_label="y")


def test_numbers_that_are_not_finite_leave_a_chart_whole() -> None:
    bad = [(0.0, math.nan), (1.0, math.inf), (2.0, 1.0), (3.0, 2.0)]
    chart = line_chart([Line("a", bad)], name="n", x_label="x", y_label="y")
    drawn = chart.split('class="hit"')[0]
    assert "nan" not in drawn and "inf" not in drawn


def strokes(chart: str) -> list[int]:
    """Points of each line or area that is drawn."""
    return [len(points.split()) for points in re.findall(r'<poly\w+ [^>]*points="([^"]*)"', chart)]


@pytest.mark.parametrize("style", ["line", "dashed"])
def test_nothing_is_drawn_across_a_gap_and_a_value_alone_is_a_dot(style: str) -> None:
    ys = [1.0, 2.0, math.nan, 3.0, math.nan, math.nan, 5.0, 6.0, 7.0]
    chart = line_chart([Line("a", [*enumerate(ys)], 0, style)], name="n", y_label="y")
    assert strokes(chart) == [2, 3] and len(re.findall(r"M[\d.,]+h0", chart)) == 1
    assert "a: nan" not in chart and chart.count("a: ") == 6


def test_a_gap_of_areas_goes_through_all_layers() -> None:
    ys = [0.25, math.nan, 0.5, 0.75, math.nan]
    layers = [Line("a", [*enumerate(ys)]), Line("b", [(x, 1 - y) for x, y in enumerate(ys)])]
    chart = area_chart(layers, name="n", y_label="y")
    assert strokes(chart) == [4, 4, 4, 4]  # of each layer a column for 0, and 2 to 3
    assert chart.count('class="hit"') == 3


def test_thinning_takes_a_gap_for_one_only_where_nothing_is() -> None:
    series = [(float(x), math.nan if x in (0, 4, 5) else 2.0) for x in range(8)]
    assert str(thin(series, 4)) == "[(0.5, 2.0), (2.5, 2.0), (4.5, nan), (6.5, 2.0)]"


def test_labels_are_escaped_in_charts() -> None:
    chart = line_chart(
        [Line("<b>", points(3)), Line("c", points(3))], name="<i>", x_label="<u>", y_label="<s>"
    )
    assert not {"b", "i", "u", "s"} & (Page(chart).tags - {"i"})
