"""Means, paired differences and their intervals, from lines of results. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]

# 97.5 % quantiles of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where methods are compared: everything of a cell but method and seed."""

    staleness: str
    lag: int
    minibatches: int = 2
    rate: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: over seeds.
        half: of the 95 % interval, by Student's t; inf for one seed.
        error: the standard error; 0 for one seed.
        count: of seeds.
    """

    mean: float
    half: float
    error: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of independent values.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, half=2.48..., error=0.57..., count=3)
    """
    count = len(values)
    if count == 1:
        return Estimate(values[0], math.inf, 0.0, 1)
    quantile = _T[min(count - 2, len(_T) - 1)]
    error = statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.fmean(values), quantile * error, error, count)


def final(line: Line) -> float:
    """Chance of a right answer at the end: mean of the last three evaluations."""
    return float(line["final"])


def whole_course(line: Line) -> float:
    """Mean of all evaluations but the first, which no method has changed: how fast it learns."""
    return statistics.fmean(line["success"][1:])


class Table:
    """Results by place, method and seed.

    Args:
        lines: of the file.
        order: of methods in tables.
    """

    def __init__(self, lines: Iterable[Line], order: Iterable[str] = ()) -> None:
        self.order = tuple(order)
        self._runs: dict[tuple[Place, str], dict[int, Line]] = {}
        for line in lines:
            place = Place(
                line["staleness"], line["lag"], line["minibatches"], line.get("rate", 1.0)
            )
            self._runs.setdefault((place, line["method"]), {})[line["seed"]] = line

    @property
    def places(self) -> list[Place]:
        """All places with a run, in the order of the tables."""
        found = {place for place, _ in self._runs}
        return sorted(found, key=lambda p: (p.minibatches, p.rate, p.staleness != "whole", p.lag))

    def methods(self, place: Place) -> list[str]:
        """Methods with a run at ``place``."""
        return [method for found, method in self._runs if found == place]

    def runs(self, place: Place, method: str) -> dict[int, Line]:
        """Lines by seed."""
        return self._runs.get((place, method), {})

    def level(
        self, place: Place, method: str, score: Callable[[Line], float] = final
    ) -> Estimate | None:
        """Mean over seeds; None without a run."""
        values = [score(line) for line in self.runs(place, method).values()]
        return estimate(values) if values else None

    def difference(
        self, place: Place, method: str, base: str, score: Callable[[Line], float] = final
    ) -> Estimate | None:
        """Mean over common seeds of what ``method`` has over ``base``; None without any."""
        ours, theirs = self.runs(place, method), self.runs(place, base)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return None
        return estimate([score(ours[seed]) - score(theirs[seed]) for seed in seeds])

    def pooled(
        self,
        places: Sequence[Place],
        method: str,
        base: str,
        score: Callable[[Line], float] = final,
    ) -> Estimate | None:
        """The difference averaged over ``places`` first, of seeds that have all of them."""
        pairs = [(self.runs(p, method), self.runs(p, base)) for p in places]
        seeds = set[int].intersection(*(set(run) for pair in pairs for run in pair))
        if not seeds:
            return None
        gains = [
            statistics.fmean(score(ours[seed]) - score(theirs[seed]) for ours, theirs in pairs)
            for seed in sorted(seeds)
        ]
        return estimate(gains)

    def measure(self, place: Place, method: str, name: str) -> float | None:
        """Mean over seeds of one of the measures."""
        values = [line[name] for line in self.runs(place, method).values() if name in line]
        return statistics.fmean(values) if values else None
