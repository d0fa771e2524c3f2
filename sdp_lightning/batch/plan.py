"""How to cut the rows of a batch into pieces: by groups, or by a budget of computed tokens.

Pure bookkeeping on lengths and group ids; a piece is a list of row indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError


def plan_microbatches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    group_ids: Sequence[int] | None = None,
    prefix_lengths: Sequence[int] | None = None,
    pair_share: float = 0.0,
) -> list[list[int]]:
    """Cut rows into as few micro-batches as a budget of computed tokens allows, evenly.

    Without groups the size of a micro-batch is rows times its longest row, and rows of like length
    go together. With groups it is the sum of lengths with the prefix of a group counted once, and a
    group stays whole if it fits. A row that is longer than the budget has one of its own. Even is
    what they cost: tokens, and pairs of tokens that attention computes.

    Args:
        lengths: tokens of each row.
        max_tokens: the budget.
        group_ids: of each row.
        prefix_lengths: leading tokens of each row that its group shares.
        pair_share: what a pair costs, in tokens.

    Returns:
        Lists of row indices that cover every row once. The same input gives the same lists.

    Raises:
        ConfigError: if ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}.")
    if group_ids is None or prefix_lengths is None:
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        units = [[row] for row in order]

        def size(rows: list[int]) -> int:
            return len(rows) * max(lengths[row] for row in rows)

        def cost(rows: list[int]) -> float:
            width = max(lengths[row] for row in rows)
            return len(rows) * (width + pair_share * width**2)

    else:

        def size(rows: list[int]) -> int:
            prefixes = {group_ids[row]: prefix_lengths[row] for row in rows}
            own = sum(lengths[row] - prefix_lengths[row] for row in rows)
            return own + sum(prefixes.values())

        def cost(rows: list[int]) -> float:
            return size(rows)  # all pairs of a pack are computed: what levels one levels the other

        members: dict[int, list[int]] = {}
        for row, group in enumerate(group_ids):
            members.setdefault(group, []).append(row)
        units = [
            unit
            for rows in members.values()
            for unit in _pack_evenly([[row] for row in rows], size, cost, max_tokens)
        ]
    return _pack_evenly(units, size, cost, max_tokens)


def split_minibatches(
    group_ids: Tensor | Sequence[int],
    num_minibatches: int,
    *,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Deal groups out to minibatches, whole, so that their numbers of groups differ by at most 1.

    Args:
        group_ids: [B] of each row.
        num_minibatches: how many.
        generator: shuffles the groups; None keeps their order.

    Returns:
        Lists of row indices that cover every row once.

    Raises:
        ConfigError: if there are fewer groups than minibatches.
    """
    ids: list[int] = torch.as_tensor(group_ids).tolist()
    groups = list(dict.fromkeys(ids))
    if not 1 <= num_minibatches <= len(groups):
        raise ConfigError(
            f"{len(groups)} groups cannot fill {num_minibatches} minibatches: groups stay whole. "
            "Use fewer minibatches or a larger batch_size."
        )
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    home = {group: i * num_minibatches // len(groups) for i, group in enumerate(groups)}
    minibatches: list[list[int]] = [[] for _ in range(num_minibatches)]
    for row, group in enumerate(ids):
        minibatches[home[group]].append(row)
    return minibatches


def _pack_evenly(
    units: list[list[int]],
    size: Callable[[list[int]], int],
    cost: Callable[[list[int]], float],
    budget: int,
) -> list[list[int]]:
    """Runs of neighboring units within the budget: as few as greedy filling needs, then level.

    Leveling searches for the least cost of a run with which there are no more runs.
    """
    packed = _fill(units, lambda rows: size(rows) <= budget)
    low, high = 0.0, max(map(cost, packed), default=0.0)
    while high - low > 0.5:
        middle = (low + high) / 2

        def fits(rows: list[int], limit: float = middle) -> bool:
            return size(rows) <= budget and cost(rows) <= limit

        trial = _fill(units, fits)
        if len(trial) <= len(packed):
            packed, high = trial, middle
        else:
            low = middle
    return packed


def _fill(units: Iterable[list[int]], fits: Callable[[list[int]], bool]) -> list[list[int]]:
    """Greedy runs of neighbors; one that does not even fit alone is a run of its own."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and fits(runs[-1] + unit):
            runs[-1] = runs[-1] + unit
        else:
            runs.append(list(unit))
    return runs
