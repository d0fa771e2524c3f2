"""Charts as HTML around SVG: pure functions of numbers. The page's style has colors and sizes.

The drawing is stretched to the width that there is, so texts are beside it in HTML and keep their
size on any screen. Every column of points has a strip over the full height that shows its numbers
under a pointer or a finger. A y of NaN is a gap: nothing is drawn across it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

Point = tuple[float, float]
SIDE = 1000  # units of the drawing, both ways
X = "policy version"
MOST_POINTS = 160


@dataclass(frozen=True)
class Line:
    """One series.

    Args:
        label: text in the legend and on hover.
        points: (x, y), x rising; y is NaN where there is no value.
        color: index in the style's palette.
        style: ``"line"``, ``"faint"`` dots, ``"dashed"``, or ``"marks"``: large dots.
    """

    label: str
    points: Sequence[Point]
    color: int = 0
    style: str = "line"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(math.isfinite(y) for _, y in self.points)


@dataclass(frozen=True)
class Frame:
    """Maps numbers to the drawing's units."""

    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        """Units from the left of an x value."""
        return SIDE * _part(value, self.x_range)

    def y(self, value: float) -> float:
        """Units from the top of a y value."""
        return SIDE * (1 - _part(value, self.y_range))


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    y_label: str,
    x_label: str = X,
    y_range: tuple[float | None, float | None] = (None, None),
    percent: bool = False,
) -> str:
    """Chart of series over one axis, with a legend if there are several.

    Args:
        lines: series, thinned to ``MOST_POINTS`` points each.
        name: title for screen readers.
        y_label: label of the y axis.
        x_label: label of the x axis.
        y_range: fixed ends of the y axis; None fits the data.
        percent: whether the values are shares of 1.
    """
    lines = [Line(s.label, thin(s.points), s.color, s.style) for s in lines if not s.is_empty]
    if not lines:
        return '<p class="empty">nothing was logged</p>'
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = Frame((min(xs), max(xs)), _range(ys, y_range))
    drawn = "".join(_draw(line, frame) for line in lines)
    form = percentage if percent else number
    hover: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            if not math.isnan(y):
                hover.setdefault(x, []).append(f"{line.label}: {form(y)}")
    labels = {"name": name, "x_label": x_label, "y_label": y_label}
    return _figure(frame, drawn, hover, lines, **labels, y_form=form)


def area_chart(
    layers: Sequence[Line], *, name: str, y_label: str, x_label: str = X, percent: bool = True
) -> str:
    """Chart of layers on top of each other, the first at the bottom; all have the same x.

    Args:
        layers: series of one length, thinned to ``MOST_POINTS`` points; where one is not finite,
            all have a gap.
        name: title for screen readers.
        y_label: label of the y axis.
        x_label: label of the x axis.
        percent: whether the layers are shares of 1.
    """
    layers = [Line(s.label, thin(s.points), s.color) for s in layers if not s.is_empty]
    if not layers:
        return '<p class="empty">nothing was logged</p>'
    xs = [x for x, _ in layers[0].points]
    below, tops = [0.0] * len(xs), list[list[float]]()
    for layer in layers:
        below = [low + y for low, (_, y) in zip(below, layer.points, strict=True)]
        tops.append(below)
    ends = (min(xs), max(xs)) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5)
    frame = Frame(ends, (0.0, 1.0) if percent else _range(below, (0.0, None)))
    edges = [ends[0], *((a + b) / 2 for a, b in pairwise(xs)), ends[1]]
    pieces = _runs(range(len(xs)), lambda i: math.isfinite(below[i]))
    drawn, floor = "", [0.0] * len(xs)
    for layer, top in zip(layers, tops, strict=True):
        for piece in pieces:
            low, high = [[(xs[i], side[i]) for i in piece] for side in (floor, top)]
            if len(piece) == 1:  # a column as wide as its strip
                sides = edges[piece[0]], edges[piece[0] + 1]
                low, high = [[(x, y[0][1]) for x in sides] for y in (low, high)]
            ring = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in [*high, *low[::-1]])
            drawn += f'<polygon class="area c{layer.color}" points="{ring}"/>'
        floor = top
    form = percentage if percent else number
    hover = {
        xs[i]: [f"{layer.label}: {form(layer.points[i][1])}" for layer in reversed(layers)]
        for piece in pieces
        for i in piece
    }
    labels = {"name": name, "x_label": x_label, "y_label": y_label}
    return _figure(frame, drawn, hover, layers, **labels, y_form=form)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of neighbors if there are more, of those that are finite.

    >>> thin([(1, 0.0), (2, 1.0), (3, 2.0), (4, math.nan)], 2)
    [(1.5, 0.5), (3.5, 2.0)]
    """
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    pieces = [points[a:b] for a, b in pairwise(edges)]
    return [
        (sum(x for x, _ in piece) / len(piece), _mean([y for _, y in piece if math.isfinite(y)]))
        for piece in pieces
    ]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them.

    >>> ticks(0, 1), ticks(3, 58)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [20.0, 40.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number with three digits and separated thousands.

    >>> number(0.12345), number(3), number(1234.5), number(2e-5), number(1.5e7)
    ('0.123', '3', '1,234', '2e-05', '15.0 M')
    """
    if 1e7 <= abs(value) < math.inf:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percentage(share: float) -> str:
    """A share of 1 as a percentage.

    >>> percentage(0.25), percentage(0.1234)
    ('25%', '12.3%')
    """
    return f"{share:.0%}" if abs(share - round(share, 2)) < 1e-9 else f"{share:.1%}"


def _part(value: float, ends: Point) -> float:
    low, high = ends
    return (value - low) / (high - low) if high > low else 0.5


def _range(values: Sequence[float], fixed: tuple[float | None, float | None]) -> Point:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low = min(finite) if fixed[0] is None else fixed[0]
    high = max(finite) if fixed[1] is None else fixed[1]
    if high <= low:
        high = low + (abs(low) or 1.0)
    room = 0.05 * (high - low)
    return (low if fixed[0] is not None else low - room), (
        high if fixed[1] is not None else high + room
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


T = TypeVar("T")


def _runs(items: Iterable[T], belongs: Callable[[T], bool]) -> list[list[T]]:
    """Neighbors that belong, between those that do not.

    >>> _runs([1, 2, 0, 3], bool)
    [[1, 2], [3]]
    """
    return [list(run) for kept, run in groupby(items, belongs) if kept]


def _draw(line: Line, frame: Frame) -> str:
    """Lines between neighbors, dots for the rest: a dot is a round stroke of no length.

    Widths of strokes are pixels of the screen, so dots stay round however wide the drawing is.
    """
    kind = f"c{line.color} {line.style}"
    dots, drawn = "", ""
    for run in _runs(line.points, lambda point: math.isfinite(point[1])):
        pixels = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run]
        if line.style in ("faint", "marks") or len(pixels) == 1:
            dots += "".join(f"M{pixel}h0" for pixel in pixels)
        else:
            drawn += f'<polyline class="stroke {kind}" points="{" ".join(pixels)}"/>'
    return drawn + (f'<path class="stroke dot {kind}" d="{dots}"/>' if dots else "")


def _figure(
    frame: Frame,
    drawn: str,
    hover: dict[float, list[str]],
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    y_form: Callable[[float], str],
) -> str:
    """Axes around the drawing, strips to hover over, and the legend."""
    rows = [(frame.y(value), y_form(value)) for value in ticks(*frame.y_range, 4)]
    columns = [(frame.x(v), number(v)) for v in ticks(*frame.x_range, 7) if v == round(v)]
    grid = "".join(f'<line class="grid" x2="{SIDE}" y1="{y:.1f}" y2="{y:.1f}"/>' for y, _ in rows)
    left = "".join(f'<span style="top:{y / SIDE:.2%}">{text}</span>' for y, text in rows)
    below = "".join(f'<span style="left:{x / SIDE:.2%}">{text}</span>' for x, text in columns)
    gutter = max((len(text) for _, text in rows), default=0)
    return (
        f'<figure class="plot">{legend(lines)}<p class="unit">{html.escape(y_label)}</p>'
        f'<div class="chart" style="margin-left:{gutter}ch"><div class="ys">{left}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img">'
        f"<title>{html.escape(name)}</title>{grid}{drawn}</svg>"
        f'<div class="xs">{below}</div>{_strips(frame, hover, x_label)}</div>'
        f'<p class="unit mid">{html.escape(x_label)}</p></figure>'
    )


def _strips(frame: Frame, hover: dict[float, list[str]], x_label: str) -> str:
    xs = sorted(hover)
    middles = [frame.x(x) for x in xs]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(middles)), float(SIDE)]
    strips = "".join(
        f'<div class="hit" style="left:{left / SIDE:.2%};width:{(right - left) / SIDE:.2%}">'
        f'<span class="{"to" if left + right < SIDE else "back"}">'
        f"{html.escape(chr(10).join([f'{x_label} {number(x)}', *hover[x]]))}</span></div>"
        for x, left, right in zip(xs, edges, edges[1:], strict=False)
    )
    return f'<div class="hits">{strips}</div>'


def legend(lines: Sequence[Line]) -> str:
    """A key for each series; empty for a single one."""
    if len(lines) < 2:
        return ""
    keys = "".join(
        f'<li><i class="key c{line.color} {line.style}"></i>{html.escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{keys}</ul>'
