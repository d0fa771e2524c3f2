"""Continuous batching: sequences join and leave between steps.

Not thread-safe; knows no futures. A step prefills waiting sequences, within a token bound, and
decodes one token of every active sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import nn

from sdp_lightning.engines.embedded.kv_cache import KVCache
from sdp_lightning.engines.embedded.sequences import (
    MAX_PREFILL_TOKENS,
    SequenceScheduler,
    SequenceState,
)
from sdp_lightning.types import IntArray

_SCAN_PER_SLOT = 4  # waiting sequences considered in one step, for each slot


@dataclass(eq=False)
class _Leader:
    """A sequence to prefill, and the ``followers`` with the same tokens, which copy its KV.

    Attributes:
        source, start: the row that already holds the KV of the first ``start`` tokens.
        end: position up to which this step computes; less than the length only if one prompt
            exceeds the token bound.
    """

    sequence: SequenceState
    source: int
    start: int
    end: int
    followers: list[SequenceState] = field(default_factory=list[SequenceState])


class Scheduler(SequenceScheduler):
    """Active sequences hold rows 0 to n-1 of the KV cache; later rows are reusable prefixes.

    An active sequence's row holds the KV of all its tokens but the last, which is the input of the
    next decode step. Waiting sequences hold no row, so a rebuild only clears every row and moves
    the active sequences back to the front of the queue.

    Args:
        model: a transformers causal LM in eval mode.
        num_layers: decoder layers of the model.
        max_slots: maximum number of active sequences.
        rows_alone: see :class:`~sdp_lightning.engines.embedded.kv_cache.KVCache`.
    """

    def __init__(
        self, model: nn.Module, *, num_layers: int, max_slots: int, rows_alone: bool = False
    ) -> None:
        super().__init__(max_slots)
        self._model = model
        device = next(model.parameters()).device
        self._kv_cache = KVCache(num_layers, max_slots, device, rows_alone=rows_alone)

    def _forget(self) -> None:
        self._kv_cache.clear()

    def _admit(self, version: int) -> None:
        leaders = self._choose(version)
        if leaders:
            self._prefill(leaders, version)

    def _decode(self) -> None:
        active = self._active
        positions = np.array([s.length - 1 for s in active])
        tokens = np.array([s.tokens[s.length - 1] for s in active])
        self._kv_cache.reserve(len(active), int(positions.max()) + 1)
        logits = self._kv_cache.forward(self._model, 0, tokens[:, None], positions)
        self._kv_cache.extend(positions, tokens)
        self._sample(active, logits)

    def _choose(self, version: int) -> list[_Leader]:
        """The next sequences to prefill, oldest first, less the prefixes that rows already hold.

        A sequence that shares at least half of its missing tokens with a chosen one waits for the
        next step, in which it copies their KV.
        """
        free = self._max_slots - len(self._active)
        leaders: list[_Leader] = []
        twins: dict[bytes, _Leader] = {}
        width = 0
        for sequence in islice(self._waiting, _SCAN_PER_SLOT * self._max_slots):
            if free == 0:
                break
            prefix = sequence.prefix
            twin = twins.get(prefix.tobytes())
            if twin is not None:
                twin.followers.append(sequence)
                free -= 1
                continue
            source, start = self._kv_cache.longest_prefix(prefix[:-1], version)
            missing = sequence.length - start
            shared = max(
                (_num_shared(leader.sequence.prefix, prefix) for leader in leaders), default=0
            )
            if 2 * (shared - start) >= missing:
                continue
            needed = max(width, missing)
            if leaders and needed * (len(leaders) + 1) > MAX_PREFILL_TOKENS:
                continue
            width = needed
            end = start + min(missing, MAX_PREFILL_TOKENS)
            leader = _Leader(sequence, source, start, end)
            leaders.append(leader)
            twins[prefix.tobytes()] = leader
            free -= 1
        return leaders

    def _prefill(self, leaders: list[_Leader], version: int) -> None:
        kv_cache, first = self._kv_cache, len(self._active)
        rows = list(range(first, first + len(leaders)))
        followers = [
            (row, s) for row, leader in zip(rows, leaders, strict=True) for s in leader.followers
        ]
        longest = max(leader.sequence.length for leader in leaders)
        kv_cache.reserve(first + len(leaders) + len(followers), longest)
        starts = [leader.start for leader in leaders]
        kv_cache.move([leader.source for leader in leaders], rows, starts)
        new = np.empty(len(leaders), dtype=object)
        for index, leader in enumerate(leaders):
            new[index] = leader.sequence.tokens[leader.start : leader.end]
        logits = kv_cache.forward(self._model, first, new, np.array(starts))
        self.num_prefill_tokens += sum(leader.end - leader.start for leader in leaders)
        kv_cache.hold(first, [leader.sequence.tokens[: leader.end] for leader in leaders], version)
        if leaders[0].end < leaders[0].sequence.length:
            return  # part of one long prompt, alone; the next step finds its row as a prefix
        sources = [row for row, _ in followers]
        if followers:
            targets = list(range(first + len(leaders), first + len(leaders) + len(followers)))
            kv_cache.move(sources, targets, [s.length for _, s in followers])
        admitted = [leader.sequence for leader in leaders] + [s for _, s in followers]
        self._active.extend(admitted)
        gone = set(admitted)
        self._waiting = deque(s for s in self._waiting if s not in gone)
        order = torch.tensor([row - first for row in rows + sources], device=logits.device)
        self._sample(admitted, logits[order])

    def _compact(self, is_gone: Callable[[SequenceState], bool]) -> None:
        """Close the gaps among the active rows; rows of gone sequences stay as prefixes."""
        remains = [not is_gone(s) for s in self._active]
        num_remaining = sum(remains)
        gaps = [row for row in range(num_remaining) if not remains[row]]
        movers = [row for row in range(num_remaining, len(self._active)) if remains[row]]
        for gap, mover in zip(gaps, movers, strict=True):
            self._active[gap] = self._active[mover]
        if gaps:
            self._kv_cache.swap(gaps, movers)
        del self._active[num_remaining:]


def _num_shared(first: IntArray, second: IntArray) -> int:
    width = min(first.size, second.size)
    differs = first[:width] != second[:width]
    return int(differs.argmax()) if differs.any() else width
