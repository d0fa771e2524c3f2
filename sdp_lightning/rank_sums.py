"""Sums over the ranks of torch.distributed's default group; one process has its own only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class RankSums:
    """Collectives: all ranks call the same ones, in the same order.

    Args:
        device: on which the ranks' backend works.
        rank: of this process.
        size: how many ranks there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:  # Lightning's own way is a barrier besides
            distributed.all_reduce(tensor)
        return tensor

    def table(self, *values: float) -> Tensor:
        """[R, n] float64 on the CPU: the ``n`` values of each of R ranks."""
        table = torch.zeros(self.size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        return table if self.size == 1 else self.add_up(table.to(self.device)).cpu()

    def concatenate(self, values: Tensor) -> Tensor:
        """[N] the values [n] of every rank, one after another."""
        sizes: list[int] = self.table(values.numel())[:, 0].long().tolist()
        start = sum(sizes[: self.rank])
        result = values.new_zeros(sum(sizes))
        result[start : start + values.numel()] = values
        return self.add_up(result)
