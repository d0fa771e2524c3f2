"""The layers below those that are trained: a token's state is computed once, for all versions.

It is kept for all who have the same tokens before it, in every batch and run of a process. The last
bits of a state depend on what was computed beside it, so a run repeats to rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from staleness.layers import KVCache, Layers, Layout, spread
from staleness.tree import Tree
from torch import Tensor
from torch.nn import functional


class Trunk(Layers):
    """Frozen layers, and the states that they gave.

    Args:
        model: as of :class:`Layers`.
        layout: of the groups.
        num_layers: how many are frozen.
        num_kept: tokens of answers whose states are kept; with more, all are forgotten.
    """

    def __init__(
        self, model: Any, layout: Layout, num_layers: int, num_kept: int = 100_000
    ) -> None:
        super().__init__(model, layout, end=num_layers)
        self.requires_grad_(False)
        self.embedding = model.model.embed_tokens.weight.detach()
        self._prompts: dict[bytes, tuple[int, Tensor, KVCache]] = {}
        self._ids, self._num_kept = dict[tuple[int, int], int](), num_kept
        self._states = torch.zeros(1024, self.embedding.shape[1])

    @torch.no_grad()
    def prompt(self, tokens: Tensor) -> tuple[int, Tensor, KVCache]:
        """Number below 0, states [P, D], and keys and values of a prompt, [P] tokens."""
        key = tokens.numpy().tobytes()
        if key not in self._prompts:
            real, cache = torch.ones(1, len(tokens), dtype=torch.bool), self.new_cache(1)
            bias = Tree(self.layout, tokens.new_zeros(1, 1, 0)).bias(0)
            x = functional.embedding(tokens, self.embedding)
            states = self.through(x, real, bias, cache=cache)
            own = [
                (k[0, :, : len(tokens)].clone(), v[0, :, : len(tokens)].clone()) for k, v in cache
            ]
            self._prompts[key] = -1 - len(self._prompts), states, own
        return self._prompts[key]

    def number(self, before: int, token: int) -> tuple[int, bool]:
        """Number of a token after the one, or the prompt, with number ``before``; is it new?"""
        known = len(self._ids)
        return self._ids.setdefault((before, token), known), len(self._ids) > known

    def keep(self, numbers: list[int], states: Tensor) -> None:
        """Keep the states [n, D] of new tokens."""
        while len(self._ids) > len(self._states):
            self._states = torch.cat([self._states, torch.zeros_like(self._states)])
        self._states[numbers] = states

    def states(self, numbers: list[int]) -> Tensor:
        """[n, D] of tokens."""
        return self._states[numbers]

    def forget(self) -> None:
        """Forget all answers, if there are too many."""
        if len(self._ids) > self._num_kept:
            self._ids.clear()


class Inputs:
    """What the trained layers read of groups: states of the trunk, or tokens where there is none.

    One of them at a time reads a trunk.

    Args:
        trunk: the frozen layers, if there are any.
        prompts: [G, P] tokens.
        num_answers: R.
    """

    def __init__(self, trunk: Trunk | None, prompts: Tensor, num_answers: int) -> None:
        self._trunk, self._prompts, self._num_answers = trunk, prompts, num_answers
        self._cache: KVCache = []  # of the trunk, once a state has to be computed
        self._filled: set[tuple[int, int]] = set()  # groups and columns of it
        if trunk is not None:
            trunk.forget()
            self._known = [trunk.prompt(tokens) for tokens in prompts]

    def __call__(self, answers: Tensor, tree: Tree, real: Tensor) -> Tensor:
        """[G, S'] tokens or [G, S', D] states of the prompts and of [G, R, n] answers.

        Args:
            answers: tokens.
            tree: of these answers, or of longer ones.
            real: [G, S'] bool. Other columns are 0 where there is a trunk.
        """
        columns = torch.cat([self._prompts, answers.transpose(1, 2).flatten(1)], 1)
        trunk, first = self._trunk, self._prompts.shape[1]
        if trunk is None:
            return columns
        numbers, new = self._number(columns, tree, real)
        if new:
            self._compute(trunk, columns, tree, new, numbers)
        states = torch.zeros(*columns.shape, trunk.embedding.shape[1])
        states[:, :first] = torch.stack([own for _, own, _ in self._known])
        if numbers:
            group, column = (torch.tensor(index) for index in zip(*numbers, strict=True))
            states[group, column] = trunk.states(list(numbers.values()))
        return states

    def _number(
        self, columns: Tensor, tree: Tree, real: Tensor
    ) -> tuple[dict[tuple[int, int], int], list[tuple[int, int]]]:
        """The trunk's numbers of the real columns of answers, and those that are new to it."""
        assert self._trunk is not None
        before, first = tree.before().tolist(), self._prompts.shape[1]
        tokens, numbers, new = columns.tolist(), dict[tuple[int, int], int](), []
        for group, column in real[:, first:].nonzero().tolist():
            place, row = divmod(column, self._num_answers)
            parent = before[group][row][place]
            root = self._known[group][0] if place == 0 else numbers[group, parent]
            here = group, first + column
            numbers[here], is_new = self._trunk.number(root, tokens[group][first + column])
            if is_new:
                new.append(here)
        return numbers, new

    @torch.no_grad()
    def _compute(
        self,
        trunk: Trunk,
        columns: Tensor,
        tree: Tree,
        new: list[tuple[int, int]],
        numbers: dict[tuple[int, int], int],
    ) -> None:
        """States of new tokens, and on the way keys and values of those before them."""
        first, before = self._prompts.shape[1], tree.before().tolist()
        if not self._cache:
            self._cache = trunk.new_cache(len(columns))
            for group, (_, _, known) in enumerate(self._known):
                for kept, own in zip(self._cache, known, strict=True):
                    for there, values in zip(kept, own, strict=True):
                        there[group, :, :first] = values
        wanted = torch.zeros(columns.shape, dtype=torch.bool)
        for group, column in new:
            while column >= first and (group, column) not in self._filled:
                self._filled.add((group, column))
                wanted[group, column] = True
                place, row = divmod(column - first, self._num_answers)
                column = before[group][row][place]
        start = int(wanted.any(0).nonzero()[0])
        end = columns.shape[1]
        bias = tree.bias((end - first) // self._num_answers)
        x = functional.embedding(columns[wanted], trunk.embedding)
        found = trunk.through(x, wanted[:, start:], bias, start=start, cache=self._cache)
        states = spread(found, wanted[:, start:])
        group, column = (torch.tensor(index) for index in zip(*new, strict=True))
        trunk.keep([numbers[here] for here in new], states[group, column - start])
