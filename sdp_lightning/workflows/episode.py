"""An open trajectory: workflows write to it, and others may read what is closed already.

Every token is stamped by the engine that sampled it. Interrupted requests are resent here, to the
original budget, so a workflow never sees an interruption. Nor does it see a resume: it runs again
from its start, and its episodes restore their logs from the checkpoint before they sample anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from sdp_lightning.engines.protocol import GenerationRequest, InferenceEngine, StopFinder
from sdp_lightning.errors import RolloutError
from sdp_lightning.types import (
    Context,
    FinishReason,
    IntArray,
    SamplingParams,
    Segment,
    Trajectory,
)
from sdp_lightning.workflows.episode_log import (
    CallEnd,
    CallStart,
    DivergenceError,
    EpisodeTimes,
    Event,
    VersionRange,
    describe_event,
    log_parts,
    versions_of,
    widest,
)
from sdp_lightning.workflows.send_gate import SendGate

MAX_EMPTY_INTERRUPTIONS = 1000


class Episode:
    """One trajectory while it is made.

    Segments appear in ``parts`` when they close (at a weight update, at the end of a ``generate``),
    under a lock, so a snapshot never holds half a segment.

    The log holds contexts, the start and end of each ``generate``, and the segments between them.
    ``restore`` takes the log of an interrupted run. Then ``add_context`` must bring the next
    context of that log, and ``generate`` the settings of its next call; it restores the segments
    and end of that call, and a call without an end goes on with the rest of its budget. Anything
    else raises ``DivergenceError``, and ``divergence`` tells the difference.

    Args:
        engine: samples.
        gate: passed by every request.
        seed: seed of this trajectory's random numbers.
        group_key: key that the episodes of one group share.
        find_stops: makes the finder of stop texts; None: there must be none.
        num_tokens: token ids from this one on have no text, and are refused; None: it is not known.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        gate: SendGate,
        *,
        seed: int = 0,
        group_key: str = "",
        find_stops: Callable[[tuple[str, ...]], StopFinder] | None = None,
        num_tokens: int | None = None,
    ) -> None:
        self._engine, self._gate, self._find_stops = engine, gate, find_stops
        self._seed, self._group_key, self._num_tokens = seed, group_key, num_tokens
        self._lock = threading.Lock()
        self._log: list[Event] = []
        self._versions: VersionRange = None
        self._position = 0  # events from here on are still to be restored
        self._finish_reason: FinishReason = "stop"
        self._divergence = ""
        self._times = EpisodeTimes(1)
        self._returned_at: float | None = None  # from the last generate

    @property
    def times(self) -> EpisodeTimes:
        """Durations so far."""
        return self._times

    @property
    def parts(self) -> tuple[Context | Segment, ...]:
        """Contexts and closed segments so far, in order."""
        with self._lock:
            return log_parts(self._log[: self._position])

    @property
    def log(self) -> tuple[Event, ...]:
        """All events so far, and those still to be restored."""
        with self._lock:
            return tuple(self._log)

    @property
    def versions(self) -> VersionRange:
        """Oldest and newest version of its tokens, those still to be restored included."""
        return self._versions

    @property
    def is_restoring(self) -> bool:
        """Whether events of an interrupted run are still to be restored."""
        return self._position < len(self._log)

    @property
    def to_restore(self) -> tuple[Event, ...]:
        """Events of an interrupted run that are still to be restored."""
        return tuple(self._log[self._position :])

    def forget(self) -> None:
        """Drop the events that are still to be restored: the workflow goes another way."""
        with self._lock:
            del self._log[self._position :]
            self._versions = versions_of(self._log)

    @property
    def divergence(self) -> str:
        """How the workflow diverged from its interrupted run; empty if it did not."""
        return self._divergence

    @property
    def token_ids(self) -> IntArray:
        """``[n]`` all tokens so far, contexts included."""
        return np.concatenate([part.token_ids for part in self.parts])

    @property
    def sampled_token_ids(self) -> IntArray:
        """``[n]`` the tokens that the policy chose so far."""
        sampled = [part.token_ids for part in self.parts if isinstance(part, Segment)]
        return np.concatenate(sampled) if sampled else np.zeros(0, dtype=np.int64)

    def restore(self, log: Sequence[Event]) -> None:
        """Restore the events of ``log``. Raises ``RolloutError`` if there are events already."""
        with self._lock:
            if self._log:
                raise RolloutError("restore() must come before the first add_context().")
            self._log = list(log)
            self._versions = versions_of(self._log)

    def add_context(self, token_ids: ArrayLike) -> None:
        """Append tokens that the policy did not choose: a prompt, a tool's output."""
        context = Context(token_ids)
        with self._lock:
            if not self.is_restoring:
                self._write(context)
                return
            saved = self._log[self._position]
            if isinstance(saved, Context) and np.array_equal(saved.token_ids, context.token_ids):
                self._position += 1
                return
        self._diverge(f"it added {describe_event(context)}", saved)

    async def generate(self, params: SamplingParams) -> FinishReason:
        """Sample until a stop or ``params.max_new_tokens``, over all interruptions.

        The last token is the stop token, or the one that completes a stop text; what an engine
        returns beyond it is cut off and counted.

        Returns:
            ``"stop"`` or ``"length"``.

        Raises:
            EngineError: if the engine cannot serve the request.
            RolloutError: if there is no context yet, or the engine only interrupts.
        """
        if not self.parts:
            raise RolloutError("generate() needs a context first: call add_context(prompt_tokens).")
        start, before = time.monotonic(), self.sampled_token_ids.size
        if self._returned_at is not None:
            self._times += EpisodeTimes(tool_s=start - self._returned_at)
            self._returned_at = None
        reason = self._begin_call(params)
        if reason is None:
            reason = await self._sample(params, self._make_completion(params, before))
            self._append(CallEnd(reason))
        self._returned_at = time.monotonic()
        self._times += EpisodeTimes(sample_s=self._returned_at - start)
        self._finish_reason = reason
        return reason

    @property
    def aside_s(self) -> float | None:
        """Seconds that its workflow has spent since the latest ``generate``; None during one."""
        return None if self._returned_at is None else time.monotonic() - self._returned_at

    def finish(
        self,
        reward: float | Mapping[str, float],
        *,
        weights: Mapping[str, float] | None = None,
        truncated: bool = False,
    ) -> Trajectory:
        """The trajectory, with the very segments that were collected here.

        Args:
            reward: reward of the whole trajectory, or several by name.
            weights: weights of several by name; None is 1 for each.
            truncated: whether a bound ended it, whatever ended its last ``generate``.
        """
        if self._returned_at is not None:
            self._times += EpisodeTimes(reward_s=time.monotonic() - self._returned_at)
        reason = "length" if truncated else self._finish_reason
        if not isinstance(reward, Mapping):
            return Trajectory(self.parts, reward=reward, finish_reason=reason)
        trajectory = Trajectory(self.parts, finish_reason=reason)
        return trajectory.with_rewards(reward, weights or dict.fromkeys(reward, 1.0))

    def _begin_call(self, params: SamplingParams) -> FinishReason | None:
        """Restore this call and return how it ended; None if the rest is still to be sampled."""
        with self._lock:
            if not self.is_restoring:
                self._write(CallStart(params))
                return None
            saved, end = self._log[self._position], self._position + 1
            if saved == CallStart(params):
                while end < len(self._log) and isinstance(self._log[end], Segment):
                    end += 1
                last = self._log[end] if end < len(self._log) else None
                if last is None or isinstance(last, CallEnd):
                    self._position = min(end + 1, len(self._log))
                    return None if last is None else last.finish_reason
        self._diverge(f"it generated with {params}", saved)

    def _make_completion(self, params: SamplingParams, before: int) -> _Completion:
        """The completion of a call, with the tokens that it has sampled already."""
        stops = None
        if params.stop_texts:
            if self._find_stops is None:
                raise RolloutError(
                    f"stop_texts={list(params.stop_texts)} need a tokenizer: give the Episode "
                    "find_stops."
                )
            stops = self._find_stops(params.stop_texts)
        completion = _Completion(frozenset(params.stop_token_ids), stops)
        completion.take(self.sampled_token_ids[before:])
        return completion

    async def _sample(self, params: SamplingParams, completion: _Completion) -> FinishReason:
        """Sample the rest of a call."""
        empty = 0

        def append(segment: Segment) -> None:
            self._require_text(segment)
            kept = completion.take(segment.token_ids)
            if kept == len(segment):
                self._append(segment)
                return
            self._times += EpisodeTimes(num_cut=len(segment) - kept)
            if kept:
                self._append(_first_tokens(segment, kept))

        while True:
            gained = len(completion.tokens)
            if completion.has_ended:
                return "stop"
            if gained >= params.max_new_tokens:
                return "length"
            request = GenerationRequest(
                token_ids=self.token_ids,
                params=replace(params, max_new_tokens=params.max_new_tokens - gained),
                seed=self._seed,
                group_key=self._group_key,
                num_sampled=gained,
                stops=completion.stops,
                num_tokens=self._num_tokens,
            )
            reason = await self._gate.send(self._engine.generate(request, append))
            beyond = len(completion.tokens) - params.max_new_tokens
            if beyond > 0:
                raise RolloutError(f"the engine sampled {beyond} tokens beyond the budget.")
            if completion.has_ended:
                return "stop"
            if reason != "abort":
                return reason
            empty = 0 if len(completion.tokens) > gained else empty + 1
            if empty > MAX_EMPTY_INTERRUPTIONS:
                raise RolloutError(
                    f"the engine interrupted a request {empty} times without one new token."
                )

    def _require_text(self, segment: Segment) -> None:
        limit, largest = self._num_tokens, int(segment.token_ids.max())
        if limit is not None and largest >= limit:
            raise RolloutError(
                f"the engine sampled token {largest}, and the tokenizer has no text for those from "
                f"{limit} on: an engine must leave out what is beyond GenerationRequest.num_tokens."
            )

    def _append(self, event: Event) -> None:
        with self._lock:
            self._write(event)

    def _write(self, event: Event) -> None:
        starts = isinstance(event, Context | CallStart)
        if starts and self._log and isinstance(self._log[-1], CallStart):
            self._log.pop()  # it raised before its first token: as if it had not been called
        self._log.append(event)
        if isinstance(event, Segment):
            self._versions = widest([self._versions, (event.version, event.version)])
        self._position = len(self._log)

    def _diverge(self, done: str, saved: Event) -> NoReturn:
        self._divergence = f"{done} where there had been {describe_event(saved)}"
        raise DivergenceError(f"the workflow does not repeat its saved steps: {self._divergence}.")


@dataclass
class _Completion:
    """What one ``generate`` has sampled, up to the token that ends it.

    Attributes:
        tokens: its tokens so far, over all interruptions.
        has_ended: whether the last of them is a stop.
    """

    stop_token_ids: frozenset[int]
    stops: StopFinder | None
    tokens: list[int] = field(default_factory=list[int])
    has_ended: bool = False

    def take(self, token_ids: IntArray) -> int:
        """Add ``token_ids`` up to the first stop; returns how many of them that are."""
        for index, token in enumerate(token_ids.tolist()):
            if self.has_ended:
                return index
            self.tokens.append(token)
            size = len(self.tokens)
            by_text = self.stops is not None and self.stops.ends(self.tokens, 0, size)
            self.has_ended = by_text or token in self.stop_token_ids
        return len(token_ids)


def _first_tokens(segment: Segment, count: int) -> Segment:
    return Segment(
        segment.version,
        segment.token_ids[:count],
        segment.logprobs[:count],
        segment.temperature,
        segment.kv_on_update,
    )
