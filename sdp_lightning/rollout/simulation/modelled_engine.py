"""A modelled engine on a virtual clock, that obeys the whole protocol of engines of servers.

One request stands for all rows of a group. Its segments have one token each, of the version that
sampled: the executor decides by versions, never by lengths. How many tokens every version really
sampled is in ``sampled``.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Mapping, Sequence

from sdp_lightning.engines.protocol import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
    require_next_version,
)
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths
from sdp_lightning.types import FinishReason, FloatArray, IntArray, Segment

_CLOSE = 1e-6  # tokens: what rounding may leave of a row


class _Request:
    """The rows of one group: how many are unfinished, and tokens since the last closed segment."""

    __slots__ = ("done", "fresh", "left", "replica", "sampled", "sink")

    def __init__(
        self,
        sink: SegmentSink,
        done: asyncio.Future[None],
        sampled: dict[int, int],
        replica: _Replica,
        left: int,
    ) -> None:
        self.sink, self.done, self.sampled, self.replica = sink, done, sampled, replica
        self.fresh, self.left = 0, left


class _Row:
    __slots__ = ("counted", "length", "request", "start")

    def __init__(self, request: _Request, length: int) -> None:
        self.request, self.length, self.start, self.counted = request, length, 0.0, 0


class _Replica:
    """One replica, in engine time, which stands still while the engine is paused.

    Attributes:
        progress: tokens that a row would have which was decoded from the beginning on.
        rows: the rows that are decoded, as a heap by the progress at which they end.
        debt_s: seconds of prefill before the next decode pass.
        busy_s: seconds with rows, so far.
        row_seconds: rows times seconds, so far.
    """

    def __init__(self, number: int, model: EngineModel) -> None:
        self.number, self.model = number, model
        self.progress = self.debt_s = self.busy_s = self.row_seconds = self._settled_s = 0.0
        self.rows: list[tuple[float, int, _Row]] = []
        self.waiting: deque[_Row] = deque()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def load(self) -> int:
        return len(self.rows) + len(self.waiting)

    @property
    def next_end_s(self) -> float:
        """Seconds until the first row ends, if there is one and no other comes."""
        pass_s = self.model.pass_s + self.model.row_s * len(self.rows)
        return self.debt_s + max(0.0, self.rows[0][0] - self.progress) * pass_s

    def settle(self, now: float) -> None:
        """Decode up to the engine time ``now``."""
        seconds, self._settled_s = now - self._settled_s, now
        if not self.rows:
            self.debt_s = 0.0
        elif seconds > 0:
            num_rows = len(self.rows)
            self.busy_s += seconds
            self.row_seconds += seconds * num_rows
            if self.debt_s:
                prefilled = min(self.debt_s, seconds)
                self.debt_s -= prefilled
                seconds -= prefilled
            self.progress += seconds / (self.model.pass_s + self.model.row_s * num_rows)

    def admit(self, ids: itertools.count[int]) -> None:
        """Begin the rows that wait, as far as there is room; the replica is settled."""
        while self.waiting and len(self.rows) < self.model.max_rows:
            row = self.waiting.popleft()
            row.start = self.progress
            heapq.heappush(self.rows, (row.start + row.length, next(ids), row))

    def ended(self) -> list[_Row]:
        """Remove and return the rows that have all their tokens; the replica is settled."""
        ended: list[_Row] = []
        while self.rows and self.rows[0][0] <= self.progress + _CLOSE:
            ended.append(heapq.heappop(self.rows)[2])
        return ended

    def remove(self, request: _Request) -> None:
        """Remove the rows of a cancelled request; the replica is settled."""
        self.rows = [entry for entry in self.rows if entry[2].request is not request]
        heapq.heapify(self.rows)
        self.waiting = deque(row for row in self.waiting if row.request is not request)


class ModelledEngine:
    """Samples groups of given lengths at a modelled speed, on the clock of the running loop.

    Everything is called in the loop's thread. A pause stops all replicas, whose rows stay.

    Args:
        model: the replicas.
        lengths: lengths of the groups, by the epoch of their only row: one that is requeued has
            the same. The number of a request is the first token of its prompt.

    Attributes:
        sampled: tokens by policy version of every group that was not removed from it.
        num_generated: tokens counted so far: at the end of a row, and at a pause.
    """

    updates_in_flight = True  # a pause keeps the requests
    stages_copies = True
    server_urls: Sequence[str] = ()
    lora_alpha: float | None = None

    def __init__(self, model: EngineModel, lengths: Lengths) -> None:
        self._model, self._lengths = model, lengths
        self._replicas = [_Replica(number, model) for number in range(model.num_replicas)]
        self._busy: dict[int, _Replica] = {}  # with rows, or cancelled ones
        self._by_load = [(0, number) for number in range(model.num_replicas)]
        self._requests: dict[int, _Request] = {}
        self._ids = itertools.count()
        self._version: int | None = None
        self._paused_at: float | None = None
        self._paused_s = 0.0
        self.sampled: dict[int, dict[int, int]] = {}
        self.num_generated = 0

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def busy_s(self) -> float:
        """Seconds in which replicas had rows, added up over replicas, as of the last pause."""
        return sum(replica.busy_s for replica in self._replicas)

    @property
    def row_seconds(self) -> float:
        """Rows times seconds, added up over replicas, as of the last pause."""
        return sum(replica.row_seconds for replica in self._replicas)

    def start(self) -> None:
        """Nothing has to be made ready."""

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        number = int(request.token_ids[0])
        replica = self._least_loaded()
        lengths = self._lengths.of(int(request.group_key.partition("/")[0]))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Request(sink, done, self.sampled.setdefault(number, {}), replica, len(lengths))
        self._requests[number] = entry
        self._settle(replica)
        replica.debt_s += self._model.prefill_token_s * self._lengths.prompt_tokens
        replica.waiting.extend(_Row(entry, length) for length in lengths)
        self._admit(replica)
        try:
            await done
            self._close_segment(entry)
        finally:
            del self._requests[number]
            if entry.left:
                self._settle(replica)
                self._count(replica)
                replica.remove(entry)
                self._admit(replica)
        return "stop"

    def pause(self) -> None:
        if self._paused_at is None:
            for replica in self._busy.values():
                self._settle(replica)
                self._count(replica)
                if replica.timer is not None:
                    replica.timer.cancel()
            self._paused_at = _now()

    def stage_weights(self, weights: NamedWeights, version: int, *, reset: bool = False) -> None:
        """Nothing has to be written."""

    def load_weights(self, version: int, *, reset: bool = False) -> PublishReport:
        require_next_version(version, self._version, holder="the engine", reset=reset)
        for entry in self._requests.values():
            self._close_segment(entry)
        if self._model.recompute_kv and self._model.prefill_token_s:
            for replica in self._busy.values():
                tokens = sum(self._lengths.prompt_tokens + r.counted for _, _, r in replica.rows)
                replica.debt_s += self._model.prefill_token_s * tokens
        self._version = version
        return PublishReport(version, 0)

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        return self.load_weights(version, reset=reset)

    def resume(self) -> None:
        if self._paused_at is not None:
            self._paused_s += _now() - self._paused_at
            self._paused_at = None
            self._busy = {n: replica for n, replica in self._busy.items() if replica.load}
            for replica in self._busy.values():
                self._schedule(replica)

    def join(self, urls: Sequence[str]) -> None:
        """There are no other ranks."""

    def drain(self) -> None:
        """A pause interrupts no request."""

    def follow(self, version: int, urls: Sequence[str]) -> None:
        """There are no other ranks."""

    def prompt_logprobs(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        return {}

    def close(self) -> None:
        """Requests end with their tasks."""

    def _settle(self, replica: _Replica) -> None:
        now = _now() if self._paused_at is None else self._paused_at
        replica.settle(now - self._paused_s)

    def _count(self, replica: _Replica) -> None:
        for _, _, row in replica.rows:
            self._count_row(row, min(row.length, int(replica.progress - row.start + _CLOSE)))

    def _count_row(self, row: _Row, num_tokens: int) -> None:
        fresh, row.counted = num_tokens - row.counted, num_tokens
        if fresh:
            assert self._version is not None
            sampled = row.request.sampled
            sampled[self._version] = sampled.get(self._version, 0) + fresh
            row.request.fresh += fresh
            self.num_generated += fresh

    def _close_segment(self, entry: _Request) -> None:
        if entry.fresh:
            assert self._version is not None
            entry.fresh = 0
            entry.sink(Segment(self._version, (0,), (0.0,)))

    def _admit(self, replica: _Replica) -> None:
        """Begin rows of a settled replica that wait, and await the next one that ends."""
        replica.admit(self._ids)
        self._busy[replica.number] = replica
        heapq.heappush(self._by_load, (replica.load, replica.number))
        self._schedule(replica)

    def _schedule(self, replica: _Replica) -> None:
        if replica.timer is not None:
            replica.timer.cancel()
        if replica.rows and self._paused_at is None:
            loop = asyncio.get_running_loop()
            replica.timer = loop.call_at(loop.time() + replica.next_end_s, self._end_rows, replica)

    def _end_rows(self, replica: _Replica) -> None:
        self._settle(replica)
        for row in replica.ended():
            self._count_row(row, row.length)
            row.request.left -= 1
            if not row.request.left and not row.request.done.done():
                row.request.done.set_result(None)
        self._admit(replica)

    def _least_loaded(self) -> _Replica:
        if len(self._by_load) > 1000 + 4 * len(self._replicas):
            self._by_load = [(replica.load, replica.number) for replica in self._replicas]
            heapq.heapify(self._by_load)
        while self._replicas[self._by_load[0][1]].load != self._by_load[0][0]:
            heapq.heappop(self._by_load)  # the load has changed since, and was noted then
        return self._replicas[self._by_load[0][1]]


def _now() -> float:
    return asyncio.get_running_loop().time()
