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
from sdp_lightning.engines.embedded.sampling import sample, uniforms
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.types import FinishReason, IntArray, SamplingParams

MAX_PREFILL_TOKENS = 512  # per step, padding included: bounds how long active sequences wait
_SCAN_PER_SLOT = 4  # waiting sequences considered in one step, for each slot


@dataclass(eq=False)
class SequenceState:
    """One sequence while it is decoded.

    Attributes:
        params, seed: how it is sampled.
        tokens: a buffer for the prompt and the whole budget; the first ``length`` are set.
        length: number of tokens so far.
        segment_start: position of the first token of the open segment.
        logprobs: log-probs of the open segment's tokens, nats.
        finish_reason: None while the sequence is unfinished.
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
        """Make the state of a request that has sampled nothing yet."""
        length = int(request.token_ids.size)
        tokens = np.zeros(length + request.params.max_new_tokens, dtype=np.int64)
        tokens[:length] = request.token_ids
        return cls(request.params, request.seed, tokens, length, length)

    @property
    def prefix(self) -> IntArray:
        """Tokens so far, prompt included."""
        return self.tokens[: self.length]

    def append(self, token: int, logprob: float) -> None:
        """Add one sampled token, which may finish the sequence."""
        self.tokens[self.length] = token
        self.length += 1
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.length == self.tokens.size:
            self.finish_reason = "length"

    def close_segment(self) -> None:
        """Start a new segment at the next token."""
        self.segment_start = self.length
        self.logprobs = []


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


class Scheduler:
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
        self.num_prefill_tokens = 0
        self.num_generated = 0
        self._model = model
        self._max_slots = max_slots
        device = next(model.parameters()).device
        self._kv_cache = KVCache(num_layers, max_slots, device, rows_alone=rows_alone)
        self._waiting: deque[SequenceState] = deque()
        self._active: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to decode."""
        return bool(self._waiting or self._active)

    @property
    def max_slots(self) -> int:
        """Maximum number of active sequences."""
        return self._max_slots

    @property
    def num_active(self) -> int:
        """Number of active sequences."""
        return len(self._active)

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence behind all others."""
        self._waiting.append(sequence)

    def remove(self, is_gone: Callable[[SequenceState], bool]) -> None:
        """Drop the sequences for which ``is_gone`` is true."""
        self._waiting = deque(s for s in self._waiting if not is_gone(s))
        self._compact(is_gone)

    @torch.inference_mode()
    def restart(self) -> None:
        """Clear the KV cache; active sequences rebuild theirs before waiting ones start."""
        self._waiting.extendleft(reversed(self._active))
        self._active = []
        self._kv_cache.clear()

    @torch.inference_mode()
    def step(self, version: int) -> list[SequenceState]:
        """Prefill some waiting sequences, then sample one token of each active sequence.

        Args:
            version: version of the weights; prefixes are shared only if all of their KV was
                computed under it. It may decrease only after a :meth:`restart`.

        Returns:
            The sequences that finished; they hold no row any more.
        """
        leaders = self._choose(version)
        if leaders:
            self._prefill(leaders, version)
        finished = self._take_finished()
        if self._active:
            self._decode()
            finished += self._take_finished()
        return finished

    def _take_finished(self) -> list[SequenceState]:
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

    def _sample(self, sequences: list[SequenceState], logits: torch.Tensor) -> None:
        uniform = uniforms([s.seed for s in sequences], [s.length for s in sequences])
        tokens, logprobs = sample(logits, [s.params for s in sequences], uniform)
        for sequence, token, logprob in zip(
            sequences, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.append(token, logprob)
        self.num_generated += len(sequences)

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
