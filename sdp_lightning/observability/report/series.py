"""Metrics over the steps of a run: series, means, and statistics of the tokens of one lag.

Rows are the logged metrics of a step by name. A metric of tokens is 0 where a batch has none (of
that lag), so such batches are gaps in a series, which are NaN, and means are weighted by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sdp_lightning.observability.report.charts import Point
from sdp_lightning.observability.report.files import VERSION
from sdp_lightning.training.metrics.names import LAG_NAMES, MetricRow

WINDOW = 5  # batches in a moving mean
CLIPPED = "clip"  # stands for the sum of the two shares below
_CLIPPED = ("loss/clip_fraction_high", "loss/clip_fraction_low")


def values_of(rows: Iterable[MetricRow], name: str) -> list[float]:
    """The values of one metric, where it was logged."""
    return [row[name] for row in rows if name in row]


def points(rows: Iterable[MetricRow], name: str, key: str = VERSION) -> list[Point]:
    """(policy version, value) of one metric, NaN where it was not logged; empty if it never was."""
    series = [(row[key], row.get(name, math.nan)) for row in rows if key in row]
    return [] if all(math.isnan(y) for _, y in series) else series


def token_points(rows: Sequence[MetricRow], name: str) -> list[Point]:
    """:func:`points` of a metric of all tokens, NaN for a batch that had none to train on."""
    return points([row if any_tokens(row) else {**row, name: math.nan} for row in rows], name)


def any_tokens(row: MetricRow) -> bool:
    """Whether a batch had tokens to train on, as far as that is known."""
    return row.get("train/tokens", 1) > 0


def when_of(evaluation: MetricRow, steps: Sequence[MetricRow]) -> str:
    """The version of an evaluation in words; one below that of the first step is before them."""
    version = evaluation["val/version"]
    is_before = bool(steps) and version < steps[0].get(VERSION, 0)
    return "before training" if is_before else f"at version {version:.0f}"


def moving_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means of the last ``window`` values; at the beginning of as many as there are.

    >>> moving_mean([1, 2, 3, 4], 2)
    [1.0, 1.5, 2.5, 3.5]
    """
    return [
        sum(values[max(0, end - window) : end]) / min(end, window)
        for end in range(1, len(values) + 1)
    ]


def moving(series: Sequence[Point]) -> list[Point]:
    """The moving mean of a series of points; gaps stay, and count in no mean."""
    means = iter(moving_mean([y for _, y in series if not math.isnan(y)]))
    return [(x, y if math.isnan(y) else next(means)) for x, y in series]


def window_mean(rows: Sequence[MetricRow], name: str) -> float | None:
    """Mean of a metric over the last batches; None if it was not logged."""
    means = moving_mean(values_of(rows, name))
    return means[-1] if means else None


def mean(rows: Sequence[MetricRow], name: str) -> float:
    """Mean over batches, or over tokens if it is a metric of one lag; 0 if it was not logged."""
    base, _, lag = name.rpartition("_")
    if lag in LAG_NAMES and not name.startswith("lag/"):
        return lag_mean(rows, base, lag) or 0.0
    values = values_of(rows, name)
    return sum(values) / len(values) if values else 0.0


# Lags ---------------------------------------------------------------------------------------------


def lag_tokens(rows: Sequence[MetricRow]) -> dict[str, float]:
    """Number of tokens of each lag, up to the largest lag that any token has."""
    counts = {lag: sum(values_of(rows, f"lag/tokens_{lag}")) for lag in LAG_NAMES}
    while counts and not counts[last := next(reversed(counts))]:
        del counts[last]
    return counts


def lag_points(rows: Sequence[MetricRow], name: str, lag: str) -> list[Point]:
    """(policy version, value) of a metric, NaN for a batch without tokens of ``lag``."""
    values = {row[VERSION]: y for row, y in _of_lag(rows, name, lag) if VERSION in row}
    xs = [row[VERSION] for row in rows if VERSION in row]
    return [(x, values.get(x, math.nan)) for x in xs] if values else []


def lag_mean(rows: Sequence[MetricRow], name: str, lag: str) -> float | None:
    """Mean of a metric over the tokens of ``lag``; None if it was not logged for any."""
    weighted = [(row[f"lag/tokens_{lag}"], value) for row, value in _of_lag(rows, name, lag)]
    total = sum(count for count, _ in weighted)
    return sum(count * value for count, value in weighted) / total if total else None


def lag_label(lag: str) -> str:
    """A lag in words.

    >>> lag_label("1"), lag_label("4plus")
    ('lag 1', 'lag 4 or more')
    """
    return f"lag {lag.replace('plus', ' or more')}"


def _of_lag(rows: Sequence[MetricRow], name: str, lag: str) -> list[tuple[MetricRow, float]]:
    names = [f"{part}_{lag}" for part in (_CLIPPED if name == CLIPPED else (name,))]
    return [
        (row, sum(row[part] for part in names))
        for row in rows
        if row.get(f"lag/tokens_{lag}", 0) > 0 and all(part in row for part in names)
    ]
