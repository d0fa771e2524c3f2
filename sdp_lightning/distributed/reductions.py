"""Sums over the ranks that train together. With one process each is its own value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from sdp_lightning.distributed.rank_group import RankGroup


@dataclass(frozen=True)
class RankSums:
    """Collectives: all ranks call the same ones, in the same order.

    Args:
        device: device of torch.distributed's default group.
        rank: rank of this process.
        size: number of ranks.
        ranks: exchanges single numbers, in a third of the time of a collective, without waiting for
            the device, and with errors that name a late rank. A group of one is not used.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    ranks: RankGroup = field(default_factory=RankGroup)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over ranks, in place."""
        if self.size > 1:  # Lightning's own reduction adds a barrier
            distributed.all_reduce(tensor)
        return tensor

    def table(self, *values: float) -> list[tuple[float, ...]]:
        """The ``values`` of each rank, in order of rank."""
        if self.ranks.size == self.size:
            return self.ranks.all_gather("counting", values)
        table = torch.zeros(self.size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        return [tuple(row) for row in self.add_up(table.to(self.device)).tolist()]

    def concatenate(self, values: Tensor) -> Tensor:
        """[N] values of all ranks, [n] of each, in order of rank."""
        sizes = [int(size) for (size,) in self.table(values.numel())]
        start = sum(sizes[: self.rank])
        result = values.new_zeros(sum(sizes))
        result[start : start + values.numel()] = values
        return self.add_up(result)
