"""An open trajectory: workflows write to it, and others may read what is closed already.

Every token is stamped by the engine that sampled it. Interruptions are resent here, to the
original budget, so a workflow never sees them.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from sdp_lightning.engines.base import GenerationRequest, InferenceEngine
from sdp_lightning.errors import RolloutError
from sdp_lightning.types import (
    Context,
    FinishReason,
    IntArray,
    SamplingParams,
    Segment,
    Trajectory,
)
from sdp_lightning.workflows.gate import SendGate

MAX_EMPTY_INTERRUPTIONS = 1000


class Episode:
    """One trajectory while it is made.

    Segments appear in ``parts`` when they close (at a weight update, at the end of a ``generate``),
    under a lock, so a snapshot never holds half a segment.

    Args:
        engine: samples.
        gate: passed by every send.
        seed: of this trajectory's random numbers.
        group_key: shared by the episodes of one group.
    """

    def __init__(
        self, engine: InferenceEngine, gate: SendGate, *, seed: int = 0, group_key: str = ""
    ) -> None:
        self._engine, self._gate = engine, gate
        self._seed, self._group_key = seed, group_key
        self._lock = threading.Lock()
        self._parts: list[Context | Segment] = []
        self._finish_reason: FinishReason = "stop"

    @property
    def parts(self) -> tuple[Context | Segment, ...]:
        """What is closed so far, in order."""
        with self._lock:
            return tuple(self._parts)

    @property
    def token_ids(self) -> IntArray:
        """``[n]`` all tokens so far, contexts included."""
        return np.concatenate([part.token_ids for part in self.parts])

    @property
    def sampled_token_ids(self) -> IntArray:
        """``[n]`` the tokens that the policy chose so far."""
        sampled = [part.token_ids for part in self.parts if isinstance(part, Segment)]
        return np.concatenate(sampled) if sampled else np.zeros(0, dtype=np.int64)

    def add_context(self, token_ids: ArrayLike) -> None:
        """Append tokens that the policy did not choose: a prompt, a tool's output."""
        self._append(Context(token_ids))

    async def generate(self, params: SamplingParams) -> FinishReason:
        """Sample until a stop token or ``params.max_new_tokens``, over all interruptions.

        Returns:
            ``"stop"`` or ``"length"``.

        Raises:
            EngineError: if the engine cannot serve the request.
            RolloutError: if there is no context yet, or the engine only interrupts.
        """
        if not self.parts:
            raise RolloutError("generate() needs a context first: call add_context(prompt_tokens).")
        left, empty = params.max_new_tokens, 0
        while True:
            request = GenerationRequest(
                token_ids=self.token_ids,
                params=replace(params, max_new_tokens=left),
                seed=self._seed,
                group_key=self._group_key,
            )
            before = self._num_sampled()
            reason = await self._gate.send(self._engine.generate(request, self._append))
            gained = self._num_sampled() - before
            left -= gained
            if reason != "abort":
                break
            if self._last_token() in params.stop_token_ids and gained:
                reason = "stop"
                break
            if left <= 0:
                reason = "length"
                break
            empty = 0 if gained else empty + 1
            if empty > MAX_EMPTY_INTERRUPTIONS:
                raise RolloutError(
                    f"the engine interrupted a request {empty} times without one new token."
                )
        if left < 0:
            raise RolloutError(f"the engine sampled {-left} tokens beyond the budget.")
        self._finish_reason = reason
        return reason

    def finish(self, reward: float) -> Trajectory:
        """The trajectory, with the very segments that were collected here."""
        return Trajectory(self.parts, reward=reward, finish_reason=self._finish_reason)

    def _append(self, part: Context | Segment) -> None:
        with self._lock:
            self._parts.append(part)

    def _num_sampled(self) -> int:
        return sum(len(part) for part in self.parts if isinstance(part, Segment))

    def _last_token(self) -> int:
        return int(self.parts[-1].token_ids[-1])
