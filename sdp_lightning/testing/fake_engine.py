"""An engine without a model, for tests; shipped so that users patch nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.engines.protocol import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
    require_next_version,
)
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, FloatArray, IntArray, Segment


@dataclass(eq=False)
class _FakeRequest:
    request: GenerationRequest
    sink: SegmentSink
    done: asyncio.Future[FinishReason]
    length: int
    sampled: list[int] = field(default_factory=list[int])
    num_closed: int = 0

    def key(self, num_sampled: int) -> tuple[str, int, tuple[int, ...]]:
        """Identity of the request when it is resent with ``num_sampled`` of its sampled tokens."""
        before = self.request.token_ids.tolist()
        tokens = (*before, *self.sampled[:num_sampled])
        return self.request.group_key, self.request.seed, tokens


class FakeEngine:
    """An inference engine without a model, that obeys the whole protocol.

    Every reply is ``reply(request)`` tokens long (at most the budget); the token at position p is
    ``p % 7 + 3`` and its log-prob ``-(version + 1) / 10``, so a wrong stamp shows in the numbers.

    Args:
        reply: total length of a reply in tokens, over all interruptions.
        manual: nothing is sampled until ``advance`` is called; otherwise each reply takes
            ``latency_s``, in ``chunks`` equal steps. It may be set later, for requests to come.
        updates_in_flight: swap weights under requests; False interrupts them at ``pause``, as a
            server does.
        latency_s: latency of a reply, in seconds.
        chunks: number of steps of a reply; weights may change between them.
        prompt_logprobs: log-probs of a prompt's own tokens but the first, in nats; None: it has
            no model to score a prompt with, so nothing compares it with the trainer.
    """

    def __init__(
        self,
        reply: Callable[[GenerationRequest], int] | int = 4,
        *,
        manual: bool = False,
        updates_in_flight: bool = True,
        latency_s: float = 0.0,
        chunks: int = 1,
        prompt_logprobs: Callable[[IntArray], FloatArray] | None = None,
    ) -> None:
        self._prompt_logprobs = prompt_logprobs
        self._reply, self.manual, self._updates_in_flight = reply, manual, updates_in_flight
        self._latency_s, self._chunks = latency_s, chunks
        self._version: int | None = None
        self._paused = self._closed = False
        self._error: EngineError | None = None
        self._changed = threading.Condition(threading.RLock())
        self._requests: list[_FakeRequest] = []
        self._left: dict[tuple[str, int, tuple[int, ...]], int] = {}
        self._held: list[asyncio.Future[None]] = []
        self.num_generated = 0
        self.num_requests = 0
        self.published: list[tuple[int, tuple[str, ...]]] = []

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def updates_in_flight(self) -> bool:
        return self._updates_in_flight

    @property
    def num_in_flight(self) -> int:
        """Number of requests that have neither ended nor been interrupted."""
        return len(self._requests)

    def start(self) -> None:
        with self._changed:
            self._raise_if_unusable()

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        loop = asyncio.get_running_loop()
        with self._changed:
            self._raise_if_unusable()
            entry = _FakeRequest(request, sink, loop.create_future(), length=1)
            wanted = self._left.pop(entry.key(0), None)
            if wanted is None:
                wanted = self._reply if isinstance(self._reply, int) else self._reply(request)
            entry.length = max(1, min(wanted, request.params.max_new_tokens))
            self._requests.append(entry)
            self.num_requests += 1
            self._changed.notify_all()
        try:
            if not self.manual:
                await self._run(entry)
            return await entry.done
        finally:
            entry.done.cancel()
            with self._changed:
                if entry in self._requests:  # cancelled: tokens of the open segment are discarded
                    self._leave(entry, num_kept=entry.num_closed)

    def wait_for_requests(
        self, count: int, *, total: int | None = None, timeout_s: float = 30.0
    ) -> None:
        """Block until exactly ``count`` requests are in flight, of ``total`` that ever came.

        Raises:
            EngineError: at the deadline.
        """

        def are_there() -> bool:
            return len(self._requests) == count and total in (None, self.num_requests)

        with self._changed:
            if not self._changed.wait_for(are_there, timeout_s):
                raise EngineError(
                    f"waited {timeout_s} s for {count} requests, {len(self._requests)} are in "
                    "flight."
                )

    def advance(
        self,
        num_tokens: int = 1,
        *,
        awaiting: int | None,
        only: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Sample up to ``num_tokens`` for every request in flight, or for the ``only``-th one.

        Args:
            num_tokens: tokens for each request.
            awaiting: number of requests that must be in flight first: this call blocks until there
                are exactly so many. None samples for those that happen to be there.
            only: index of one request, in the order of arrival.
            timeout_s: deadline of the wait in seconds.

        Raises:
            EngineError: at the deadline; it says how many requests are in flight.
        """
        with self._changed:
            if awaiting is not None:
                self.wait_for_requests(awaiting, timeout_s=timeout_s)
            chosen = list(self._requests) if only is None else [self._requests[only]]
            for entry in chosen:
                self._sample(entry, num_tokens)

    def fail(self, message: str) -> None:
        """Fail every request in flight and every later call."""
        with self._changed:
            self._error = EngineError(message)
            self._fail_all(self._error)

    def pause(self) -> None:
        with self._changed:
            self._paused = True
            if not self._updates_in_flight:
                for entry in list(self._requests):
                    self._end(entry, "abort")

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        with self._changed:
            self._raise_if_unusable()
            require_next_version(version, self._version, holder="the engine", reset=reset)
            named = list(weights)
            if not self._updates_in_flight and any(entry.sampled for entry in self._requests):
                raise EngineError("weights changed under running requests: pause() must come first")
            for entry in self._requests:
                self._close_segment(entry)
            self._version = version
            self._release()
            self.published.append((version, tuple(name for name, _ in named)))
            return PublishReport(version, sum(t.nbytes for _, t in named))

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._release()

    def prompt_logprobs(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        return {} if self._prompt_logprobs is None else {"fake": self._prompt_logprobs(token_ids)}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._fail_all(EngineError("the engine was closed."))

    async def _run(self, entry: _FakeRequest) -> None:
        per_chunk = -(-entry.length // self._chunks)
        while entry in self._requests:
            await asyncio.sleep(self._latency_s / self._chunks)
            may_go_on: asyncio.Future[None] = entry.done.get_loop().create_future()
            with self._changed:
                if self._paused or self._version is None:
                    self._held.append(may_go_on)
                else:
                    self._sample(entry, per_chunk)
                    may_go_on.set_result(None)
            await asyncio.wait((may_go_on, entry.done), return_when=asyncio.FIRST_COMPLETED)

    def _sample(self, entry: _FakeRequest, num_tokens: int) -> None:
        if self._paused or self._version is None or entry not in self._requests:
            return
        for _ in range(min(num_tokens, entry.length - len(entry.sampled))):
            position = entry.request.token_ids.size + len(entry.sampled)
            entry.sampled.append(int(position) % 7 + 3)
            self.num_generated += 1
        if len(entry.sampled) == entry.length:
            full = len(entry.sampled) == entry.request.params.max_new_tokens
            self._end(entry, "length" if full else "stop")

    def _close_segment(self, entry: _FakeRequest) -> None:
        tokens = entry.sampled[entry.num_closed :]
        if tokens and self._version is not None:
            logprobs = [-(self._version + 1) / 10] * len(tokens)
            entry.num_closed = len(entry.sampled)
            entry.sink(Segment(self._version, tokens, logprobs, entry.request.params.temperature))

    def _end(self, entry: _FakeRequest, reason: FinishReason) -> None:
        self._close_segment(entry)
        self._leave(entry, num_kept=len(entry.sampled))
        settle(entry.done, reason)

    def _fail_all(self, error: EngineError) -> None:
        for entry in list(self._requests):
            self._leave(entry, num_kept=entry.length)
            settle(entry.done, error)

    def _leave(self, entry: _FakeRequest, *, num_kept: int) -> None:
        self._requests.remove(entry)
        if num_kept < entry.length:
            self._left[entry.key(num_kept)] = entry.length - num_kept
        self._changed.notify_all()

    def _release(self) -> None:
        held, self._held = self._held, []
        for future in held:
            settle(future, None)

    def _raise_if_unusable(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise EngineError("the engine was closed.")
