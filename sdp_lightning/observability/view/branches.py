"""Where the trajectories of one sample leave each other: the tree that a view draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Branch:
    """One trajectory of a sample that has several.

    Args:
        number: from 1, in the order of the sample.
        leaves: number of the branch before it with which it shares most; None: it shares nothing.
        shared: leading tokens that the two share, of those that it read before it said anything.
        depth: number of branches between it and one that shares nothing.
    """

    number: int
    leaves: int | None = None
    shared: int = 0
    depth: int = 0


def branches_of(rows: Sequence[NDArray[np.int64]], num_read: Sequence[int]) -> list[Branch | None]:
    """Branches of the trajectories of one sample; None for one that is alone.

    Args:
        rows: tokens of each.
        num_read: number of tokens of each before its first sampled one.
    """
    if len(rows) < 2:
        return [None] * len(rows)
    found: list[Branch] = []
    for number, (tokens, read) in enumerate(zip(rows, num_read, strict=True), start=1):
        lengths = [_num_shared(tokens[:read], other) for other in rows[: number - 1]]
        shared = max(lengths, default=0)
        if not shared:
            found.append(Branch(number))
            continue
        near = lengths.index(shared)
        found.append(Branch(number, near + 1, shared, found[near].depth + 1))
    return list(found)


def _num_shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    size = min(one.size, other.size)
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if differs.size else size
