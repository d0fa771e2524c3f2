"""Charts of the report page as SVG."""

from __future__ import annotations

import math

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


def test_labels_are_escaped_in_charts() -> None:
    chart = line_chart(
        [Line("<b>", points(3)), Line("c", points(3))], name="<i>", x_label="<u>", y_label="<s>"
    )
    assert not {"b", "i", "u", "s"} & (Page(chart).tags - {"i"})
