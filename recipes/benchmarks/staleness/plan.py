"""Which runs there are, in what order, and the file that they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from staleness.methods import METHODS
from staleness.training import Cell

STALENESS = ("whole", "mixed")
ENGINE_BITS = (8, 4, 3)  # of bfloat16, float8_e4m3 and float8_e5m2


def stage_1(seeds: Iterable[int] = range(3), lags: Sequence[int] = (4, 8, 0)) -> Iterator[Cell]:
    """Every method, few seeds."""
    for seed in seeds:
        for lag in lags:
            for staleness in STALENESS if lag else STALENESS[:1]:
                for method in METHODS:
                    yield Cell(method, staleness, lag, seed=seed)


def stage_2(methods: Sequence[str], seeds: Iterable[int] = range(10)) -> Iterator[Cell]:
    """The best methods and the origin's, all lags, 2, 4, 1 minibatches; what tells most first."""
    seeds = list(seeds)
    old = [((4, 8, 2), minibatches) for minibatches in (2, 4, 1)]
    young = [((1, 0), minibatches) for minibatches in (2, 4, 1)]
    for lags, minibatches in old + young:
        for seed in seeds:
            for lag in lags:
                for staleness in STALENESS if lag else STALENESS[:1]:
                    for method in methods:
                        yield Cell(method, staleness, lag, minibatches, seed)


def controls(methods: Sequence[str], seeds: Iterable[int]) -> Iterator[Cell]:
    """The same with smaller and larger steps: is a method better, or only slower?"""
    for seed in seeds:
        for lag in (8, 4):
            for rate in (0.5, 2.0):
                for method in methods:
                    yield Cell(method, "whole", lag, seed=seed, rate=rate)


def engines(methods: Sequence[str], seeds: Iterable[int]) -> Iterator[Cell]:
    """The same with an engine that rounds its weights: what it disagrees about is in b alone."""
    for seed in seeds:
        for lag in (1, 4):
            for bits in ENGINE_BITS:
                for method in methods:
                    yield Cell(method, "whole", lag, 1, seed, engine_bits=bits)


def representative(cell: Cell) -> Cell:
    """The cell that is run for this one: one stands for all of its kind. A test holds that.

    With an engine that rounds b is not x at lag 0, as which every run begins.
    """
    rounds = cell.engine_bits is not None
    if rounds and (cell.lag == 0 or METHODS[cell.method].loss.trust_region == "past"):
        return cell
    kind = METHODS[cell.method].kind(cell.lag)
    first = next(name for name, method in METHODS.items() if method.kind(cell.lag) == kind)
    return replace(cell, method=first, staleness=cell.staleness if cell.lag else "whole")


class Results:
    """Lines of JSON, one a run: an interrupted job goes on where it was.

    Args:
        path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Whole lines; one that a kill has cut is left out."""
        text = self._path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    @property
    def done(self) -> set[Cell]:
        """Cells with a line."""
        return {cell_of(line) for line in self.lines}

    def append(self, line: dict[str, Any]) -> None:
        """One line, after a cut one is taken off."""
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def cell_of(line: dict[str, Any]) -> Cell:
    """The cell of a line of results; a field that it lacks is as usual."""
    return Cell(**{name: line[name] for name in Cell.__dataclass_fields__ if name in line})


def fill(
    results: Results,
    cells: Iterable[Cell],
    compute: Callable[[Cell], dict[str, Any]],
    *,
    may_go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Compute the cells that are not there yet, in order. Returns how many were computed."""
    done, count = results.done, 0
    for cell in map(representative, cells):
        if cell in done:
            continue
        if not may_go_on():
            break
        results.append(compute(cell))
        done.add(cell)
        count += 1
    return count
