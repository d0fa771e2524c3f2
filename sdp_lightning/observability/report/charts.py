"""Charts as SVG text: pure functions of numbers. Colors and fonts come from the page's style.

Every column of points has a strip over the full height, whose title a browser shows on hover.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
HEIGHT = 260
WIDTH, WIDE = 560, 1120  # a chart in a column, and across the page
X = "policy version"
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 44
MOST_POINTS = 160


@dataclass(frozen=True)
class Line:
    """One series.

    Args:
        label: text in the legend and on hover.
        points: (x, y), x rising.
        color: index in the style's palette.
        style: ``"line"``, ``"faint"`` dots, ``"dashed"``, or ``"marks"``: large dots.
    """

    label: str
    points: Sequence[Point]
    color: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Frame:
    """Maps numbers to pixels of a chart."""

    x_range: Point
    y_range: Point
    width: int = WIDTH

    @property
    def right(self) -> int:
        """End of the x axis, in pixels."""
        return self.width - RIGHT

    def x(self, value: float) -> float:
        """Pixels from the left of an x value."""
        return LEFT + _part(value, self.x_range) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Pixels from the top of a y value."""
        return HEIGHT - BOTTOM - _part(value, self.y_range) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    y_label: str,
    x_label: str = X,
    y_range: tuple[float | None, float | None] = (None, None),
    width: int = WIDTH,
) -> str:
    """Chart of series over one axis, with a legend if there are several.

    Args:
        lines: series, thinned to ``MOST_POINTS`` points each.
        name: title for screen readers.
        y_label: label of the y axis.
        x_label: label of the x axis.
        y_range: fixed ends of the y axis; None fits the data.
        width: width in pixels; a page may scale it.
    """
    lines = [Line(s.label, thin(s.points), s.color, s.style) for s in lines if s.points]
    if not lines:
        return '<p class="empty">nothing was logged</p>'
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = Frame((min(xs), max(xs)), _range(ys, y_range), width)
    drawn = "".join(_draw(line, frame) for line in lines)
    hover: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            hover.setdefault(x, []).append(f"{line.label}: {number(y)}")
    return _figure(frame, drawn, hover, lines, name=name, x_label=x_label, y_label=y_label)


def area_chart(
    layers: Sequence[Line], *, name: str, y_label: str, x_label: str = X, percent: bool = True
) -> str:
    """Chart of layers on top of each other, the first at the bottom; all have the same x.

    Args:
        layers: series of one length, thinned to ``MOST_POINTS`` points.
        name: title for screen readers.
        y_label: label of the y axis.
        x_label: label of the x axis.
        percent: whether the layers are shares of 1.
    """
    layers = [Line(s.label, thin(s.points), s.color) for s in layers if s.points]
    if not layers:
        return '<p class="empty">nothing was logged</p>'
    xs = [x for x, _ in layers[0].points]
    below, tops = [0.0] * len(xs), list[list[float]]()
    for layer in layers:
        below = [low + y for low, (_, y) in zip(below, layer.points, strict=True)]
        tops.append(below)
    frame = Frame((min(xs), max(xs)), (0.0, 1.0) if percent else _range(below, (0.0, None)))
    drawn, floor = "", [0.0] * len(xs)
    for layer, top in zip(layers, tops, strict=True):
        ring = [*zip(xs, top, strict=True), *reversed([*zip(xs, floor, strict=True)])]
        if len(xs) == 1:  # a column as wide as the chart
            ring = [(0, top[0]), (1, top[0]), (1, floor[0]), (0, floor[0])]
            frame = Frame((0.0, 1.0), frame.y_range)
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in ring)
        drawn += f'<polygon class="area c{layer.color}" points="{path}"/>'
        floor = top
    form = percentage if percent else number
    hover = {
        x: [f"{layer.label}: {form(layer.points[i][1])}" for layer in reversed(layers)]
        for i, x in enumerate(xs)
    }
    labels = {"name": name, "x_label": x_label, "y_label": y_label}
    return _figure(frame, drawn, hover, layers, **labels, y_form=form)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of neighbors if there are more.

    >>> thin([(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)], 2)
    [(1.5, 0.5), (3.5, 2.5)]
    """
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    pieces = [points[a:b] for a, b in pairwise(edges)]
    return [
        (sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece))
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
    if abs(value) >= 1e7:
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


def _draw(line: Line, frame: Frame) -> str:
    pixels = [(frame.x(x), frame.y(y)) for x, y in line.points if math.isfinite(y)]
    kind = f"c{line.color} {line.style}"
    if line.style in ("faint", "marks") or len(pixels) == 1:
        radius = 2.5 if line.style == "faint" else 4.5
        return "".join(
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
            for x, y in pixels
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    return f'<polyline class="stroke {kind}" points="{path}"/>'


def _figure(
    frame: Frame,
    drawn: str,
    hover: dict[float, list[str]],
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    y_form: Callable[[float], str] = number,
) -> str:
    """Axes around the drawing, strips to hover over, and the legend."""
    bottom, right = HEIGHT - BOTTOM, frame.right
    parts = [f'<svg class="chart" viewBox="0 0 {frame.width} {HEIGHT}" role="img">']
    parts.append(f"<title>{html.escape(name)}</title>")
    for value in ticks(*frame.y_range, 4):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{y_form(value)}</text>')
    for value in ticks(*frame.x_range, 7):
        if value == round(value):
            x = frame.x(value)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="mid">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" class="mid label">'
        f"{html.escape(x_label)}</text>"
        f'<text x="14" y="{middle:.0f}" class="mid label" '
        f'transform="rotate(-90 14 {middle:.0f})">{html.escape(y_label)}</text>'
    )
    parts += [drawn, _strips(frame, hover, x_label), "</svg>"]
    return '<figure class="plot">' + legend(lines) + "".join(parts) + "</figure>"


def _strips(frame: Frame, hover: dict[float, list[str]], x_label: str) -> str:
    xs = sorted(hover)
    pixels = [frame.x(x) for x in xs]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(pixels)), frame.right]
    return "".join(
        f'<rect class="hit" x="{left:.1f}" width="{max(right - left, 1):.1f}" y="{TOP}" '
        f'height="{HEIGHT - TOP - BOTTOM}"><title>'
        f"{html.escape(f'{x_label} {number(x)}' + chr(10) + chr(10).join(hover[x]))}</title></rect>"
        for x, left, right in zip(xs, edges, edges[1:], strict=False)
    )


def legend(lines: Sequence[Line]) -> str:
    """A key for each series; empty for a single one."""
    if len(lines) < 2:
        return ""
    keys = "".join(
        f'<li><i class="key c{line.color} {line.style}"></i>{html.escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{keys}</ul>'
