"""Decoding row by row: every sequence has a state of its own, and shares whole prompts only.

Not thread-safe; knows no futures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_lightning.engines.embedded.row_decoder import RowDecoder, RowState
from sdp_lightning.engines.embedded.sequences import (
    MAX_PREFILL_TOKENS,
    SequenceScheduler,
    SequenceState,
)

_NUM_PROMPTS = 4  # computed prompts that are kept for sequences to come


@dataclass(frozen=True)
class _Prompt:
    """A computed prompt, which later sequences with the same tokens copy.

    Attributes:
        version: of the weights that computed it.
        state: never advanced.
        logits: ``[1, V]`` after its last token.
    """

    version: int
    state: RowState
    logits: Tensor


class RowScheduler(SequenceScheduler):
    """Each active sequence holds the state of all its tokens but the last.

    A state cannot be cut, so that sequences share a prompt only if it is all of their tokens, and a
    rebuild computes each of them from its first token on.

    Args:
        decoder: runs the model.
        max_slots: maximum number of active sequences.
    """

    def __init__(self, decoder: RowDecoder, *, max_slots: int) -> None:
        super().__init__(max_slots)
        self._decoder = decoder
        self._states: dict[SequenceState, RowState] = {}
        self._prompts: dict[bytes, _Prompt] = {}

    def _admit(self, version: int) -> None:
        admitted: list[SequenceState] = []
        logits: list[Tensor] = []
        last = self.num_prefill_tokens + MAX_PREFILL_TOKENS
        while self._waiting and self.num_active < self._max_slots:
            if self.num_prefill_tokens >= last:
                break
            sequence = self._waiting.popleft()
            prompt = self._prompt(sequence, version)
            self._states[sequence] = prompt.state.copy()
            self._active.append(sequence)
            admitted.append(sequence)
            logits.append(prompt.logits)
        if admitted:
            self._sample(admitted, torch.cat(logits))

    def _prompt(self, sequence: SequenceState, version: int) -> _Prompt:
        """The computed tokens of a sequence, from another one where they are the same."""
        key = sequence.prefix.tobytes()
        prompt = self._prompts.pop(key, None)
        if prompt is None or prompt.version != version:
            prompt = _Prompt(version, *self._decoder.start(sequence.prefix))
            self.num_prefill_tokens += sequence.length
        self._prompts[key] = prompt  # the newest last
        if len(self._prompts) > _NUM_PROMPTS:
            del self._prompts[next(iter(self._prompts))]
        return prompt

    def _decode(self) -> None:
        logits = [self._decoder.extend(self._states[s], s.prefix) for s in self._active]
        self._sample(self._active, torch.cat(logits))

    def _compact(self, is_gone: Callable[[SequenceState], bool]) -> None:
        for sequence in [s for s in self._active if is_gone(s)]:
            self._active.remove(sequence)
            del self._states[sequence]

    def _forget(self) -> None:
        self._states.clear()
        self._prompts.clear()
