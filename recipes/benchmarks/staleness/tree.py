"""Answers of a group that begin alike share the columns of their beginning."""

from __future__ import annotations

import torch
from staleness.layers import Layout
from torch import Tensor
from torch.nn import functional


class Tree:
    """The columns of packed groups that have to be computed, and what each of them sees.

    Args:
        layout: of the groups.
        answers: [G, R, n] tokens.

    Attributes:
        owner: [G, R, n] the first answer of the group that has the same tokens up to this one. Its
            column stands for all.
    """

    def __init__(self, layout: Layout, answers: Tensor) -> None:
        same = (answers[:, :, None] == answers[:, None]).cumprod(-1)  # [G, R, R, n]
        self._layout, self.owner = layout, same.argmax(2)  # of equal ones the first

    def owned(self, wanted: Tensor) -> Tensor:
        """[G, R, m] bool, the owners of the tokens [G, R, m] that are wanted."""
        rows = wanted.shape[1]
        hot = functional.one_hot(self.owner[..., : wanted.shape[2]], rows).bool()
        return (hot & wanted[..., None]).any(1).transpose(1, 2)

    def real(self, wanted: Tensor) -> Tensor:
        """[G, P + mR] bool, the columns of the prompt and of the wanted tokens [G, R, m]."""
        prompt = wanted.new_ones(len(wanted), self._layout.prompt_length)
        return torch.cat([prompt, self.owned(wanted).transpose(1, 2).flatten(1)], 1)

    def before(self) -> Tensor:
        """[G, R, n] the column whose state predicts a token."""
        first, (_, rows, count) = self._layout.prompt_length, self.owner.shape
        column = first + torch.arange(count) * rows + self.owner
        return functional.pad(column, (1, 0), value=first - 1)[..., :-1]

    def bias(self, count: int) -> Tensor:
        """[G, S, S] of the attention of the prompt and the first ``count`` tokens.

        A column sees the prompt and its own answer, up to itself.
        """
        first, rows = self._layout.prompt_length, self.owner.shape[1]
        places = self._layout.positions[: first + count * rows]
        sees = (places[:, None] >= places).repeat(len(self.owner), 1, 1)
        own = functional.one_hot(self.owner[..., :count], rows).bool()
        sees[:, first:, first:] &= own.flatten(2).repeat(1, count, 1)
        return torch.zeros(sees.shape).masked_fill(~sees, -1e9)
