"""Which runs there are, in what order, and the file that they are written to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from staleness.methods import METHODS, ON_REAL_MODELS
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
    """The best methods and the origin's, all lags and minibatches; the most informative first."""
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
    if rounds and (cell.lag == 0 or ON_REAL_MODELS[cell.method].loss.trust_region == "past"):
        return cell
    return replace(
        cell,
        method=_first_of_kind(cell.method, cell.lag),
        staleness=cell.staleness if cell.lag else "whole",
    )


@cache  # the tables ask for it 80,000 times
def _first_of_kind(method: str, lag: int) -> str:
    kind = ON_REAL_MODELS[method].kind(lag)
    return next(name for name, other in ON_REAL_MODELS.items() if other.kind(lag) == kind)


class Results:
    """Lines of JSON in one compressed file, so an interrupted job continues.

    A line is a run, or what the probe measured of one method. One process at a time may write.

    Args:
        path: a ``.jsonl.gz`` file; no file is no lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Lines of runs, oldest first."""
        return [line for line in self._lines() if not _is_probe(line)]

    @property
    def gradients(self) -> list[dict[str, Any]]:
        """Lines of the probe, oldest first."""
        return [line for line in self._lines() if _is_probe(line)]

    @property
    def done(self) -> set[Cell]:
        """Cells with a run."""
        return {cell_of(line) for line in self.runs}

    def append(self, *lines: dict[str, Any]) -> None:
        """Replace the file by one with these lines at its end; a kill leaves the old file."""
        text = self._text() + "".join(json.dumps(line) + "\n" for line in lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_bytes(gzip.compress(text.encode(), mtime=0))
        part.replace(self._path)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._text().splitlines()]

    def _text(self) -> str:
        return gzip.decompress(self._path.read_bytes()).decode() if self._path.exists() else ""


def _is_probe(line: dict[str, Any]) -> bool:
    return "cosine_of_mean" in line


def cell_of(line: dict[str, Any]) -> Cell:
    """The cell of a line of results; a missing field has its default."""
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
