"""Sequences under way, and what every scheduler of them does: queue, sample, take out the finished.

Not thread-safe; knows no futures and no cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdp_lightning.engines.embedded.sampling import sample, uniforms
from sdp_lightning.engines.protocol import GenerationRequest, StopFinder
from sdp_lightning.types import FinishReason, IntArray, SamplingParams

MAX_PREFILL_TOKENS = 512  # per step, padding included: bounds how long active sequences wait


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
        begin: position of the first token of the completion.
        stops: finds stop texts in the completion, if there are any.
        num_tokens: token ids from this one on are not sampled; None: all may be.
    """

    params: SamplingParams
    seed: int
    tokens: IntArray
    length: int
    segment_start: int
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: FinishReason | None = None
    begin: int = 0
    stops: StopFinder | None = None
    num_tokens: int | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> SequenceState:
        """Make the state of a request that has sampled nothing yet."""
        length = int(request.token_ids.size)
        tokens = np.zeros(length + request.params.max_new_tokens, dtype=np.int64)
        tokens[:length] = request.token_ids
        return cls(
            *(request.params, request.seed, tokens, length, length),
            begin=length - request.num_sampled,
            stops=request.stops,
            num_tokens=request.num_tokens,
        )

    @property
    def prefix(self) -> IntArray:
        """Tokens so far, prompt included."""
        return self.tokens[: self.length]

    def append(self, token: int, logprob: float) -> None:
        """Add one sampled token, which may finish the sequence."""
        self.tokens[self.length] = token
        self.length += 1
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids or (
            self.stops is not None and self.stops.ends(self.tokens, self.begin, self.length)
        ):
            self.finish_reason = "stop"
        elif self.length == self.tokens.size:
            self.finish_reason = "length"

    def close_segment(self) -> None:
        """Start a new segment at the next token."""
        self.segment_start = self.length
        self.logprobs = []


class SequenceScheduler(ABC):
    """Sequences that wait, oldest first, and at most ``max_slots`` that are active.

    Attributes:
        num_prefill_tokens: prompt tokens computed so far.
        num_generated: tokens sampled so far.
    """

    def __init__(self, max_slots: int) -> None:
        self.num_prefill_tokens = 0
        self.num_generated = 0
        self._max_slots = max_slots
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
        """Forget what is computed; active sequences are rebuilt before waiting ones start."""
        self._waiting.extendleft(reversed(self._active))
        self._active = []
        self._forget()

    @torch.inference_mode()
    def step(self, version: int) -> list[SequenceState]:
        """Prefill some waiting sequences, then sample one token of each active sequence.

        Args:
            version: version of the weights; prefixes are shared only if all of them was computed
                under it. It may decrease only after a :meth:`restart`.

        Returns:
            The sequences that finished; nothing is held for them any more.
        """
        self._admit(version)
        finished = self._take_finished()
        if self._active:
            self._decode()
            finished += self._take_finished()
        return finished

    @abstractmethod
    def _admit(self, version: int) -> None:
        """Prefill some waiting sequences and sample their first tokens."""

    @abstractmethod
    def _decode(self) -> None:
        """Sample one token of each active sequence."""

    @abstractmethod
    def _compact(self, is_gone: Callable[[SequenceState], bool]) -> None:
        """Drop the active sequences for which ``is_gone`` is true."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop all that was computed under the weights so far."""

    def _take_finished(self) -> list[SequenceState]:
        finished = [s for s in self._active if s.finish_reason is not None]
        if finished:
            self._compact(lambda sequence: sequence.finish_reason is not None)
        return finished

    def _sample(self, sequences: Sequence[SequenceState], logits: Tensor) -> None:
        """Append a token to each sequence from its row of ``logits`` ``[B, V]``."""
        uniform = uniforms([s.seed for s in sequences], [s.length for s in sequences])
        logits = _with_text(logits, [s.num_tokens for s in sequences])
        tokens, logprobs = sample(logits, [s.params for s in sequences], uniform)
        for sequence, token, logprob in zip(
            sequences, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.append(token, logprob)
        self.num_generated += len(sequences)


def _with_text(logits: Tensor, num_tokens: Sequence[int | None]) -> Tensor:
    """``[B, V]`` logits of the tokens that each row may sample, -inf of others, or cut."""
    size = logits.shape[-1]
    limits = [size if number is None else min(number, size) for number in num_tokens]
    logits = logits[:, : max(limits)]
    if min(limits) == max(limits):
        return logits
    last = torch.tensor(limits, device=logits.device)[:, None]
    tokens = torch.arange(max(limits), device=logits.device)
    return logits.masked_fill(tokens >= last, -torch.inf)
