"""Cuts the rows of a batch into pieces: by groups, or by a budget of computed tokens.

Pure functions of lengths and group ids; a piece is a list of row indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError


@dataclass(frozen=True)
class AttentionCosts:
    """Costs of attention, in the unit of one token through the linear layers.

    Args:
        pair: cost of a pair of tokens.
        span: fixed cost of a call.
        by_span: packed rows, and groups that share a prefix, are attended one by one; else all
            pairs of a pack are computed.
    """

    pair: float = 0.0
    span: float = 0.0
    by_span: bool = True

    def padded(self, lengths: Sequence[int]) -> float:
        """Cost of rows of these lengths, padded to the longest."""
        width = max(lengths)
        return len(lengths) * (width + self.pair * width**2) + self.span

    def packed(self, spans: Sequence[int]) -> float:
        """Cost of packed spans of these lengths."""
        total = sum(spans)
        if not self.by_span:
            return total + self.pair * total**2 + self.span
        return total + self.pair * sum(n**2 for n in spans) + self.span * len(spans)


FREE = AttentionCosts()


def pad_microbatches(
    lengths: Sequence[int], max_tokens: int, costs: AttentionCosts = FREE
) -> list[list[int]]:
    """Cut rows into as few micro-batches as a budget allows, evenly, each padded to its longest.

    The size of a micro-batch is rows times its longest row; rows of similar length go together. A
    row longer than the budget is alone. Micro-batches are even in cost.

    Args:
        lengths: tokens of each row.
        max_tokens: the budget of computed tokens.
        costs: costs of attention.

    Returns:
        Lists of row indices that cover every row once. The same input gives the same lists.

    Raises:
        ConfigError: if ``max_tokens`` is below 1.
    """
    _check_budget(max_tokens)
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))

    def size(rows: list[int]) -> int:
        return len(rows) * max(lengths[row] for row in rows)

    def cost(rows: list[int]) -> float:
        return costs.padded([lengths[row] for row in rows])

    return _pack_evenly([[row] for row in order], size, cost, max_tokens)


def share_microbatches(
    lengths: Sequence[int],
    prefix_lengths: Sequence[int],
    group_ids: Sequence[int],
    max_tokens: int,
    costs: AttentionCosts = FREE,
) -> list[list[int]]:
    """Cut rows as :func:`pad_microbatches` does, without padding, a group's prefix counted once.

    Args:
        lengths: tokens of each row.
        prefix_lengths: leading tokens of each row that its group shares.
        group_ids: group of each row. A group stays whole if it fits.
        max_tokens: the budget of computed tokens.
        costs: costs of attention.
    """
    _check_budget(max_tokens)

    def size(rows: list[int]) -> int:
        return sum(shared_spans(rows, lengths, prefix_lengths, group_ids))

    def cost(rows: list[int]) -> float:
        return costs.packed(shared_spans(rows, lengths, prefix_lengths, group_ids))

    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        members.setdefault(group, []).append(row)
    units = [
        unit
        for rows in members.values()
        for unit in _pack_evenly([[row] for row in rows], size, cost, max_tokens)
    ]
    return _pack_evenly(units, size, cost, max_tokens)


def shared_spans(
    rows: Iterable[int],
    lengths: Sequence[int],
    prefix_lengths: Sequence[int],
    group_ids: Sequence[int],
) -> list[int]:
    """Tokens that each group has among ``rows``, its prefix once."""
    spans: dict[int, int] = {}
    for row in rows:
        before = spans.get(group_ids[row], prefix_lengths[row])
        spans[group_ids[row]] = before + lengths[row] - prefix_lengths[row]
    return list(spans.values())


def pack_microbatches(
    lengths: Sequence[int], max_tokens: int, costs: AttentionCosts = FREE
) -> list[list[int]]:
    """Cut rows as :func:`pad_microbatches` does, packed, with long and short rows mixed.

    Each row, longest first, joins the cheapest micro-batch that has room, of as few as suffice for
    that.
    """
    _check_budget(max_tokens)
    fewest = -(-sum(min(length, max_tokens) for length in lengths) // max_tokens)
    for number in range(max(1, fewest), len(lengths) + 1):
        packs = _spread(lengths, max_tokens, number, costs)
        if packs is not None:
            return packs
    return []


def _spread(
    lengths: Sequence[int], max_tokens: int, number: int, costs: AttentionCosts
) -> list[list[int]] | None:
    """Rows over ``number`` micro-batches; None if one finds no room."""
    packs: list[list[int]] = [[] for _ in range(number)]
    tokens, cost = [0] * number, [0.0] * number
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        room = [i for i, n in enumerate(tokens) if not n or not length or n + length <= max_tokens]
        if not room:
            return None
        cheapest = min(room, key=cost.__getitem__)
        packs[cheapest].append(row)
        tokens[cheapest] += length
        cost[cheapest] += costs.packed([length])
    return [pack for pack in packs if pack]


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


def _check_budget(max_tokens: int) -> None:
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}.")
