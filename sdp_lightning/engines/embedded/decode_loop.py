"""The decode thread, and how other threads stop it between two steps.

Knows requests, sinks and futures, but no weights.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.engines.embedded.sequences import SequenceScheduler, SequenceState
from sdp_lightning.engines.protocol import SegmentSink
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, KVPolicy, Segment

STEP_DEADLINE_S = 600.0  # longest wait for one decode step to end
CLOSE_DEADLINE_S = 60.0  # longest wait for the thread to end
GATHER_S = 0.001  # how long an idle engine waits for the next request of a burst
THREAD_NAME = "sdp-embedded-engine"


@dataclass(eq=False)
class Job:
    """A request on its way: its sequence, its sink, and the future that it resolves."""

    sequence: SequenceState
    sink: SegmentSink
    future: asyncio.Future[FinishReason]


class DecodeLoop:
    """One daemon thread that steps a scheduler while there is work, a version and no pause.

    One condition guards all shared state. The scheduler belongs to the thread during a step and to
    the caller inside :meth:`hold`.

    Args:
        scheduler: decodes one step at a time.
        num_threads: torch threads of this thread; None leaves the default (GPU).
        kv_on_update: recorded with the segments.

    Attributes:
        version: stamped on segments; None before the first weights. Set it inside ``hold``.
    """

    def __init__(
        self, scheduler: SequenceScheduler, *, num_threads: int | None, kv_on_update: KVPolicy
    ) -> None:
        self.version: int | None = None
        self._scheduler = scheduler
        self._num_threads = num_threads
        self._kv_on_update: KVPolicy = kv_on_update
        self._changed = threading.Condition()
        self._jobs: dict[SequenceState, Job] = {}
        self._arrived: list[Job] = []
        self._left: set[SequenceState] = set()
        self._failure: BaseException | None = None
        self._paused = self._closing = self._stepping = False
        self._num_holds = 0
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def require_usable(self) -> None:
        """Raise ``EngineError`` with the cause once the thread, or an update, has failed."""
        if self._failure is not None:
            raise self._unusable()
        if self._closing:
            raise EngineError("the engine is closed. Make a new one.")

    def submit(self, job: Job) -> None:
        """Queue a request; its future is resolved on its own event loop."""
        with self._changed:
            self.require_usable()
            self._jobs[job.sequence] = job
            self._arrived.append(job)
            self._changed.notify_all()

    def forget(self, job: Job) -> None:
        """Free the slot of a request that nobody awaits any more. No-op once it is settled."""
        with self._changed:
            if self._jobs.pop(job.sequence, None) is not None:
                self._left.add(job.sequence)
                self._changed.notify_all()

    def pause(self) -> None:
        """Wait for the running step to end; start no other."""
        with self._changed:
            self._paused = True
            self._await_step()

    def resume(self) -> None:
        """End the pause."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    @contextmanager
    def hold(self) -> Generator[None]:
        """Context in which no step runs. The pause state is the same afterwards."""
        with self._changed:
            self._num_holds += 1
        try:
            with self._changed:
                self._await_step()
            self.require_usable()
            yield
        finally:
            with self._changed:
                self._num_holds -= 1
                self._changed.notify_all()

    def close_segments(self) -> None:
        """Inside ``hold``: close each request's open segment and pass it to the request's sink."""
        for job in self._outstanding():
            self._deliver(job)

    def fail(self, error: BaseException) -> None:
        """Fail every request, present and future, with ``error`` as the cause."""
        with self._changed:
            self._failure = error
            self._stepping = False
            self._changed.notify_all()
        for job in self._take_all():
            settle(job.future, self._unusable())

    def close(self) -> None:
        """Stop the thread, fail outstanding requests. Safe to call twice, and after a failure."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_DEADLINE_S)
            if self._thread.is_alive():
                raise EngineError(f"a decode step did not end within {CLOSE_DEADLINE_S:.0f} s.")
        for job in self._take_all():
            settle(
                job.future, EngineError("the engine was closed while this request was under way.")
            )

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while (version := self._begin_step()) is not None:
                for sequence in self._scheduler.step(version):
                    self._finish(sequence)
                with self._changed:
                    self._stepping = False
                    self._changed.notify_all()
        except BaseException as error:  # reaches every request, now and later
            self.fail(error)

    def _begin_step(self) -> int | None:
        """Wait for work; returns the version to decode under, or None when the thread must end."""
        with self._changed:
            while True:
                self._gather()  # releases the lock, so read shared state only after it
                if self._closing or self._failure is not None:
                    return None
                if self._num_holds == 0:
                    self._admit()
                    if not self._paused and self.version is not None and self._scheduler.has_work:
                        self._stepping = True
                        return self.version
                self._changed.wait()

    def _gather(self) -> None:
        """Wait for all requests of a burst, which arrive one by one, if nothing is decoding yet."""
        num_seen = 0
        while num_seen < min(len(self._arrived), self._scheduler.max_slots):
            if self._num_holds or self._scheduler.has_work:
                return
            num_seen = len(self._arrived)
            self._changed.wait(GATHER_S)

    def _admit(self) -> None:
        for job in self._arrived:
            self._scheduler.add(job.sequence)
        self._arrived.clear()
        if self._left:
            left = self._left
            self._scheduler.remove(lambda sequence: sequence in left)
            self._left = set()

    def _finish(self, sequence: SequenceState) -> None:
        with self._changed:
            job = self._jobs.get(sequence)
        reason = sequence.finish_reason
        if job is None or reason is None or not self._deliver(job):
            return
        with self._changed:
            self._jobs.pop(sequence, None)
        settle(job.future, reason)

    def _deliver(self, job: Job) -> bool:
        """Pass the open segment to the sink. A sink that raises fails its own request only."""
        sequence, version = job.sequence, self.version
        if not sequence.logprobs or version is None:
            return True
        try:
            segment = Segment(
                version,
                sequence.tokens[sequence.segment_start : sequence.length],
                sequence.logprobs,
                sequence.params.temperature,
                self._kv_on_update,
            )
            sequence.close_segment()
            job.sink(segment)
        except Exception as error:  # passed on to whoever awaits this request
            self.forget(job)
            failure = EngineError(
                f"a segment could not be handed over: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            settle(job.future, failure)
            return False
        return True

    def _await_step(self) -> None:
        """Wait until no step runs; the caller holds the lock. The decode thread does not wait."""
        if self._thread is threading.current_thread():
            return
        if not self._changed.wait_for(lambda: not self._stepping, STEP_DEADLINE_S):
            raise EngineError(f"a decode step did not end within {STEP_DEADLINE_S:.0f} s.")

    def _outstanding(self) -> list[Job]:
        with self._changed:
            return list(self._jobs.values())

    def _take_all(self) -> list[Job]:
        with self._changed:
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._arrived.clear()
            return jobs

    def _unusable(self) -> EngineError:
        cause = self._failure
        error = EngineError(f"the engine failed and is unusable: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error
