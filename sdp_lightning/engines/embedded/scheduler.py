"""Continuous batching: sequences join and leave between steps.

One thread at a time, no versions of its own, no futures. A step prefills what waits, within a token
bound, and decodes one token of every active sequence.
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
from sdp_lightning.engines.embedded.sampling import sample, uniforms
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.types import FinishReason, IntArray, SamplingParams

MAX_PREFILL_TOKENS = 512  # of one step, padding included: how long active sequences may be held up
_SCAN_PER_SLOT = 4  # waiting sequences looked at in one step, for each slot


@dataclass(eq=False)
class SequenceState:
    """One sequence while it is decoded.

    Attributes:
        params, seed: how it is sampled.
        tokens: room for the prompt and the whole budget; the first ``length`` are there.
        length: tokens so far.
        segment_start: where the open segment begins.
        logprobs: of the open segment, nats.
        finish_reason: None while it goes on.
    """

    params: SamplingParams
    seed: int
    tokens: IntArray
    length: int
    segment_start: int
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> SequenceState:
        """A sequence that has sampled nothing yet."""
        length = int(request.token_ids.size)
        tokens = np.zeros(length + request.params.max_new_tokens, dtype=np.int64)
        tokens[:length] = request.token_ids
        return cls(request.params, request.seed, tokens, length, length)

    @property
    def prefix(self) -> IntArray:
        """All tokens so far."""
        return self.tokens[: self.length]

    def append(self, token: int, logprob: float) -> None:
        """Take one sampled token; maybe it is the last."""
        self.tokens[self.length] = token
        self.length += 1
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.length == self.tokens.size:
            self.finish_reason = "length"

    def close_segment(self) -> None:
        """What comes next belongs to a new segment."""
        self.segment_start = self.length
        self.logprobs = []


@dataclass(eq=False)
class _Leader:
    """A sequence whose prefix is computed, and those with the very same tokens.

    Attributes:
        source, start: the row that holds the first ``start`` tokens already.
        end: how far this step computes; short of the length only if one prompt exceeds the bound.
    """

    sequence: SequenceState
    source: int
    start: int
    end: int
    followers: list[SequenceState] = field(default_factory=list[SequenceState])


class Scheduler:
    """Active sequences sit in rows 0 to n-1 of the table; all later rows are remembered prefixes.

    An active sequence's row holds the KV of all its tokens but the last, which the next decode step
    feeds. Waiting sequences hold no row, so dropping every row and moving the active ones back to
    the front of the queue is all that a rebuild takes.

    Args:
        model: a transformers causal LM in eval mode.
        max_slots: the most active sequences.
    """

    def __init__(self, model: nn.Module, *, num_layers: int, max_slots: int) -> None:
        self.num_prefill_tokens = 0
        self.num_generated = 0
        self._model = model
        self._max_slots = max_slots
        device = next(model.parameters()).device
        self._kv_cache = KVCache(num_layers, max_slots, device)
        self._waiting: deque[SequenceState] = deque()
        self._active: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would sample anything."""
        return bool(self._waiting or self._active)

    @property
    def max_slots(self) -> int:
        """The most sequences that decode together."""
        return self._max_slots

    @property
    def num_active(self) -> int:
        """Sequences in slots."""
        return len(self._active)

    def add(self, sequence: SequenceState) -> None:
        """Queue it, behind all others."""
        self._waiting.append(sequence)

    def remove(self, is_gone: Callable[[SequenceState], bool]) -> None:
        """Let go of sequences that nobody waits for any more."""
        self._waiting = deque(s for s in self._waiting if not is_gone(s))
        self._compact(is_gone)

    @torch.inference_mode()
    def restart(self) -> None:
        """Forget all KV; sequences under way rebuild theirs before any that wait."""
        self._waiting.extendleft(reversed(self._active))
        self._active = []
        self._kv_cache.clear()

    @torch.inference_mode()
    def step(self, version: int) -> list[SequenceState]:
        """Prefill some that wait, then sample one token of each active one.

        Args:
            version: of the weights; only prefixes computed under it alone are shared. It may go
                back only after a :meth:`restart`.

        Returns:
            The sequences that finished; they have left their slots.
        """
        leaders = self._choose(version)
        if leaders:
            self._prefill(leaders, version)
        finished = self._leave()
        if self._active:
            self._decode()
            finished += self._leave()
        return finished

    def _leave(self) -> list[SequenceState]:
        finished = [s for s in self._active if s.finish_reason is not None]
        if finished:
            self._compact(lambda sequence: sequence.finish_reason is not None)
        return finished

    def _decode(self) -> None:
        active = self._active
        positions = np.array([s.length - 1 for s in active])
        tokens = np.array([s.tokens[s.length - 1] for s in active])
        self._kv_cache.reserve(len(active), int(positions.max()) + 1)
        logits = self._kv_cache.forward(self._model, 0, tokens[:, None], positions)
        self._kv_cache.extend(positions, tokens)
        self._sample(active, logits)

    def _choose(self, version: int) -> list[_Leader]:
        """The next sequences to prefill, oldest first, with what is shared left out.

        One that shares at least half of its missing tokens with a chosen one waits for the next
        step, in which it copies them.
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
            shared = max((_num_shared(one.sequence.prefix, prefix) for one in leaders), default=0)
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
            (row, s) for row, one in zip(rows, leaders, strict=True) for s in one.followers
        ]
        longest = max(one.sequence.length for one in leaders)
        kv_cache.reserve(first + len(leaders) + len(followers), longest)
        starts = [one.start for one in leaders]
        kv_cache.move([one.source for one in leaders], rows, starts)
        new = np.empty(len(leaders), dtype=object)
        for index, one in enumerate(leaders):
            new[index] = one.sequence.tokens[one.start : one.end]
        logits = kv_cache.forward(self._model, first, new, np.array(starts))
        self.num_prefill_tokens += sum(one.end - one.start for one in leaders)
        kv_cache.hold(first, [one.sequence.tokens[: one.end] for one in leaders], version)
        if leaders[0].end < leaders[0].sequence.length:
            return  # a part of one long prompt, alone; its row is found as a prefix next time
        sources = [row for row, _ in followers]
        if followers:
            targets = list(range(first + len(leaders), first + len(leaders) + len(followers)))
            kv_cache.move(sources, targets, [s.length for _, s in followers])
        admitted = [one.sequence for one in leaders] + [s for _, s in followers]
        self._active.extend(admitted)
        gone = set(admitted)
        self._waiting = deque(s for s in self._waiting if s not in gone)
        order = torch.tensor([row - first for row in rows + sources], device=logits.device)
        self._sample(admitted, logits[order])

    def _sample(self, sequences: list[SequenceState], logits: torch.Tensor) -> None:
        uniform = uniforms([s.seed for s in sequences], [s.length for s in sequences])
        tokens, logprobs = sample(logits, [s.params for s in sequences], uniform)
        for sequence, token, logprob in zip(
            sequences, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.append(token, logprob)
        self.num_generated += len(sequences)

    def _compact(self, is_gone: Callable[[SequenceState], bool]) -> None:
        """Close the gaps among the active rows; what the gone ones held stays as a prefix."""
        going_on = [not is_gone(s) for s in self._active]
        num_left = sum(going_on)
        gaps = [row for row in range(num_left) if not going_on[row]]
        movers = [row for row in range(num_left, len(self._active)) if going_on[row]]
        for gap, mover in zip(gaps, movers, strict=True):
            self._active[gap] = self._active[mover]
        if gaps:
            self._kv_cache.swap(gaps, movers)
        del self._active[num_left:]


def _num_shared(first: IntArray, second: IntArray) -> int:
    width = min(first.size, second.size)
    differs = first[:width] != second[:width]
    return int(differs.argmax()) if differs.any() else width
