"""Threads that each keep one worker process, and the queue of calls that they share.

A call is bytes and its future holds a ``CallOutcome``. No policy and no event loop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.worker_process import (
    ANSWERS,
    CallOutcome,
    KilledWhileLoadingError,
    LostBetweenCallsError,
    WorkerProcess,
    WorkerSettings,
)

logger = logging.getLogger(__name__)

_MOST_LOST = 3  # processes that end before a call, of one call
_Job = tuple[bytes, "Future[CallOutcome]"]


class Tally:
    """Counts of outcomes. A pool that is closed and opened again goes on with its tally."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._num_killed_in_a_row = 0

    def add(self, outcome: CallOutcome) -> None:
        """Count one call."""
        with self._lock:
            self._counts[outcome.kind] += 1
            if outcome.kind == "value" and outcome.detail:
                self._counts["verifier_raised"] += 1
            killed = outcome.kind not in ANSWERS
            self._num_killed_in_a_row = self._num_killed_in_a_row + 1 if killed else 0

    @property
    def num_killed_in_a_row(self) -> int:
        """Calls since the last one that answered."""
        return self._num_killed_in_a_row

    def snapshot(self) -> Counter[str]:
        """The counts by kind."""
        with self._lock:
            return self._counts.copy()


class WorkerThreads:
    """At most ``num_workers`` processes, each started when there is a call for it.

    A process that a call ended is replaced at the next call. ``close`` is final.
    """

    def __init__(
        self, settings: WorkerSettings, *, num_workers: int, timeout_s: float, tally: Tally
    ) -> None:
        self._settings, self._timeout_s, self._tally = settings, timeout_s, tally
        self._num_workers, self._num_idle = num_workers, 0
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._processes: set[WorkerProcess] = set()
        self._notes: set[str] = set()  # said already
        self._closed = False
        self._process_id = os.getpid()

    def submit(self, arguments: bytes) -> Future[CallOutcome]:
        """Queue a call; a cancelled future takes it out again unless it runs already.

        Raises:
            RolloutError: if the pool is closed. The future raises it if the pool is closed later,
                or if the reward cannot be loaded.
        """
        future: Future[CallOutcome] = Future()
        with self._changed:
            if self._closed:
                raise RolloutError("the reward pool was closed.")
            self._jobs.append((arguments, future))
            if len(self._jobs) > self._num_idle and len(self._threads) < self._num_workers:
                name = f"sdp-reward-{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._changed.notify()
        return future

    def close(self, timeout_s: float = 10.0) -> None:
        """Kill all processes, fail all calls, end all threads. Safe to call twice.

        In a forked child there are no threads, and the processes belong to the parent: they are
        left alone.
        """
        if os.getpid() != self._process_id:
            for process in self._processes:
                process.forget()
            return
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            for process in self._processes:
                process.kill()
            self._changed.notify_all()
        for _, future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(RolloutError("the reward pool was closed."))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self) -> None:
        process: WorkerProcess | None = None
        while (job := self._next()) is not None:
            arguments, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                process, outcome = self._call(process, arguments)
            except Exception as error:  # raised where the reward is awaited
                future.set_exception(error)
            else:
                self._finish(future, outcome)
        self._discard(process)

    def _call(
        self, process: WorkerProcess | None, arguments: bytes
    ) -> tuple[WorkerProcess, CallOutcome]:
        """The outcome, and the process that was called: another one if the last is lost."""
        num_lost = 0
        while True:
            if process is None or not process.is_alive:
                if process is not None and process.has_ended_itself:
                    self._warn_of_loss()
                self._discard(process)
                process = self._start()
            try:
                return process, process.call(arguments, self._timeout_s)
            except LostBetweenCallsError:
                num_lost += 1
                if num_lost == _MOST_LOST:
                    detail = f"ended {num_lost} processes before they were called"
                    return process, CallOutcome("crashed", detail=detail)
                self._warn_of_loss()

    def _warn_of_loss(self) -> None:
        logger.warning(
            "a worker process of reward %r ended, or was written into, after its last answer; "
            "another one takes the next call",
            self._settings.name,
        )

    def _next(self) -> _Job | None:
        with self._changed:
            self._num_idle += 1
            self._changed.wait_for(lambda: self._jobs or self._closed)
            self._num_idle -= 1
            return None if self._closed else self._jobs.popleft()

    def _start(self, *, again: bool = False) -> WorkerProcess:
        """A worker that has loaded the reward; one that is killed meanwhile is started again."""
        process = WorkerProcess(self._settings)
        with self._changed:
            self._processes.add(process)
            if self._closed:
                process.kill()
        try:
            notes = process.load()
        except RolloutError as error:
            self._discard(process)
            if self._closed:
                raise RolloutError("the reward pool was closed.") from error
            if not isinstance(error, KilledWhileLoadingError):
                raise
            if again:
                raise RolloutError(
                    f"{error} So did the one before: if this machine has no memory left (the "
                    "kernel's log tells), use fewer workers."
                ) from error
            logger.warning("%s Another one is started.", error)
            return self._start(again=True)
        for note in notes:
            with self._changed:
                is_new = note not in self._notes
                self._notes.add(note)
            if is_new:
                logger.warning("workers of reward %r: %s", self._settings.name, note)
        return process

    def _discard(self, process: WorkerProcess | None) -> None:
        if process is not None:
            with self._changed:
                self._processes.discard(process)
            process.close()

    def _finish(self, future: Future[CallOutcome], outcome: CallOutcome) -> None:
        if self._closed and outcome.kind == "crashed":
            future.set_exception(RolloutError("the reward pool was closed."))
            return
        self._tally.add(outcome)
        future.set_result(outcome)
