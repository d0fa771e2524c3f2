"""Runs coroutines in an event loop in a thread of its own; another thread takes the results.

Event-driven: only an ``interrupted`` callback is polled. It knows no rollouts.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sdp_lightning.distributed.event_loop import call_in
from sdp_lightning.errors import ConfigError, RolloutError, RolloutTimeout, error_text

STOP_CHECK_S = 0.2  # how often a wait asks whether it was interrupted
AsyncFunction = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class TaskResult:
    """The value or the error of one task."""

    task_id: int
    value: object = None
    error: Exception | None = None


class AsyncTaskRunner:
    """Runs coroutine functions concurrently; every task that is not cancelled yields one result.

    Args:
        name: name of the thread.
        max_running: tasks that run at once; None is no bound.
        max_pending: tasks that may wait to start; one more is refused.
        max_failures: failed tasks that ``wait`` tolerates (counted in ``num_failed``); one more
            raises.
        on_result: called with each result in the loop's thread; ``wait`` then gets none.
        interrupted: polled while ``wait`` waits; True ends the wait.

    The thread starts with the first ``submit`` or ``start``, never in the constructor. If it dies,
    every waiter raises its error. After ``run_in`` there is no thread: tasks run in that loop.
    """

    def __init__(
        self,
        *,
        name: str = "sdp-runner",
        max_running: int | None = None,
        max_pending: int = 100_000,
        max_failures: int = 0,
        on_result: Callable[[TaskResult], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> None:
        if (max_running is not None and max_running < 1) or max_pending < 1 or max_failures < 0:
            raise ConfigError(
                "AsyncTaskRunner needs max_running >= 1 (or None), max_pending >= 1 and "
                f"max_failures >= 0; got {max_running}, {max_pending} and {max_failures}."
            )
        self.name = name
        self.num_failed = 0
        self._max_running, self._max_pending = max_running, max_pending
        self._max_failures, self._on_result = max_failures, on_result
        self._interrupted = interrupted
        self._ids = itertools.count()
        self._inputs: OrderedDict[int, tuple[AsyncFunction, tuple[Any, ...]]] = OrderedDict()
        self._running: dict[int, asyncio.Task[object]] = {}
        self._cancelled: set[int] = set()
        self._results: deque[TaskResult] = deque()
        self._failures: list[TaskResult] = []
        self._changed = threading.Condition()
        self._paused = self._closed = self._ending = False
        self._death: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def num_outstanding(self) -> int:
        """Number of tasks that wait or run."""
        return len(self._inputs) + len(self._running)

    def run_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run tasks in ``loop``, which its owner runs in this thread, so nothing may ``wait``."""
        if self._loop is not None:
            raise RolloutError(f"runner {self.name!r} has started: run_in() must come first.")
        self._loop = loop

    def start(self) -> None:
        """Start the thread, if it does not run yet and is needed."""
        with self._changed:
            if self._closed:
                raise RolloutError(f"runner {self.name!r} is closed.")
            if self._loop is not None:
                return
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
            self._thread.start()

    def submit(self, function: AsyncFunction, *args: Any) -> int:
        """Queue ``function(*args)``; returns its id. Any thread may call.

        Raises:
            RolloutError: if ``max_pending`` tasks wait already, or the runner is closed or dead.
        """
        self.start()
        with self._changed:
            self.raise_if_dead()
            if len(self._inputs) >= self._max_pending:
                raise RolloutError(f"{self._max_pending} tasks wait already; take results first.")
            task_id = next(self._ids)
            self._inputs[task_id] = function, args
        self._poke(self._start_tasks)
        return task_id

    def wait(self, count: int, timeout: float | None = None) -> list[Any]:
        """Values of the ``count`` tasks that finished first; others stay for the next call.

        Raises:
            RolloutTimeout: at the deadline (seconds), or interrupted; nothing is taken.
            RolloutError: if a task failed beyond ``max_failures``, or too few are left to ever
                make up ``count``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                self._raise_failures()
                if len(self._results) >= count:
                    return [self._results.popleft().value for _ in range(count)]
                self.raise_if_dead()
                if len(self._results) + self.num_outstanding < count:
                    raise RolloutError(
                        f"asked for {count} results, but {len(self._results)} are ready and "
                        f"{self.num_outstanding} tasks are left."
                    )
                left = None if deadline is None else deadline - time.monotonic()
                stopped = self._interrupted is not None and self._interrupted()
                if stopped or (left is not None and left <= 0):
                    why = "interrupted while waiting" if stopped else f"waited {timeout:.4g} s"
                    raise RolloutTimeout(
                        f"{why} for {count} results: {len(self._results)} are ready, "
                        f"{len(self._running)} run, {len(self._inputs)} wait to start."
                    )
                if self._interrupted is not None:
                    left = STOP_CHECK_S if left is None else min(left, STOP_CHECK_S)
                self._changed.wait(left)

    def cancel(self, task_id: int) -> None:
        """Cancel a task that waits or runs; it yields no result. Unknown ids are ignored."""
        self._poke(self._cancel_now, task_id)

    def pause(self) -> None:
        """Start no more tasks; running ones go on."""
        self._paused = True

    def resume(self) -> None:
        """Start tasks again."""
        self._paused = False
        self._poke(self._start_tasks)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel all tasks and end the thread. Safe to call twice.

        Raises:
            RolloutTimeout: if the thread has not ended by the deadline: a task blocks its loop.
        """
        with self._changed:
            already, self._closed = self._closed, True
            self._changed.notify_all()
        if not already:
            self._poke(self._stop)
        if self._thread is None or threading.current_thread() is self._thread:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise RolloutTimeout(
                f"thread {self.name!r} did not end within {timeout} s of close(): a task blocks "
                "its event loop. Use await, or a plain reward function, which gets its own thread."
            )

    # In the loop's thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        except BaseException as error:  # raised again in every waiter, by raise_if_dead
            self._die(error)
        finally:
            if not self._closed:
                self._die(RolloutError("its event loop was stopped"))
            self._ending = True
            self._inputs.clear()
            _cancel_all(self._loop)
            self._loop.close()

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._death = self._death or error
            self._changed.notify_all()

    def _start_tasks(self) -> None:
        assert self._loop is not None
        while self._inputs and not self._paused and not self._closed:
            if self._max_running is not None and len(self._running) >= self._max_running:
                return
            with self._changed:
                task_id, (function, args) = self._inputs.popitem(last=False)
                task = self._loop.create_task(_call(function, args), name=f"{self.name}-{task_id}")
                self._running[task_id] = task
            task.add_done_callback(functools.partial(self._on_done, task_id))

    def _on_done(self, task_id: int, task: asyncio.Task[object]) -> None:
        # A callback, not a finally in the task: one cancelled before its first step never runs it.
        result = self._result_of(task_id, task)
        with self._changed:
            self._running.pop(task_id, None)
            if result is not None and self._on_result is None:
                (self._results if result.error is None else self._failures).append(result)
            self._changed.notify_all()
        if result is not None and self._on_result is not None:
            self._deliver(result, self._on_result)
        self._start_tasks()

    def _result_of(self, task_id: int, task: asyncio.Task[object]) -> TaskResult | None:
        """The result; None if this runner cancelled the task."""
        if task_id in self._cancelled or self._ending:
            self._cancelled.discard(task_id)
            if task.cancelled():
                return None
        if task.cancelled():
            cause: BaseException | None = asyncio.CancelledError()
        else:
            cause = task.exception()
        if cause is None:
            return TaskResult(task_id, value=task.result())
        if isinstance(cause, Exception):
            return TaskResult(task_id, error=cause)
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            return None  # asyncio raises it in the loop, too: the thread dies of it
        error = RuntimeError(f"ended by {error_text(cause)}")
        error.__cause__ = cause
        return TaskResult(task_id, error=error)

    def _deliver(self, result: TaskResult, on_result: Callable[[TaskResult], None]) -> None:
        try:
            on_result(result)
        except BaseException as error:  # raised again in every waiter, by raise_if_dead
            self._die(error)
            self._stop()

    def _stop(self) -> None:
        if self._loop is None or self._ending:
            return
        if self._thread is not None:
            self._loop.stop()
        for task_id in [*self._running, *self._inputs] if self._thread is None else ():
            self._cancel_now(task_id)

    def _cancel_now(self, task_id: int) -> None:
        task = self._running.get(task_id)
        if task is not None:
            self._cancelled.add(task_id)
            task.cancel()
        else:
            with self._changed:
                self._inputs.pop(task_id, None)
                self._changed.notify_all()

    # Helpers -------------------------------------------------------------------------------------

    def _poke(self, callback: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            call_in(self._loop, callback, *args)

    def _raise_failures(self) -> None:
        failures, self._failures = self._failures, []
        if not failures:
            return
        self.num_failed += len(failures)
        if self.num_failed > self._max_failures:
            first = failures[0]
            raise RolloutError(
                f"task {first.task_id} failed ({self.num_failed} failed, {self._max_failures} "
                f"tolerated): {first.error!r}"
            ) from first.error

    def raise_if_dead(self) -> None:
        """Raise ``RolloutError`` with the cause if the thread died, or was closed."""
        if self._death is not None:
            raise RolloutError(f"thread {self.name!r} died: {self._death!r}") from self._death
        if self._closed:
            raise RolloutError(f"runner {self.name!r} is closed.")


async def _call(function: AsyncFunction, args: tuple[Any, ...]) -> object:
    return await function(*args)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
