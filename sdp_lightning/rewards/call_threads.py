"""Threads for plain functions that may block: a bounded number, and a queue for the calls beyond.

A thread cannot be killed. One whose caller has given up is *lost*: it counts no more as running, so
it takes no place from others, and ends when its function returns. Lost threads are bounded too.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.errors import RolloutError

NUM_THREADS = 256  # calls that run at once
MAX_LOST = 256  # calls that were given up and have not returned


@dataclass(eq=False)
class ThreadCall:
    """One call.

    Attributes:
        started: done when a thread has begun with the call.
        finished: the value and the exception of the function, whatever its class; a pair, since
            a future takes no ``StopIteration``.
        state: ``"dropped"`` was given up in the queue, ``"lost"`` while it ran.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    started: asyncio.Future[None]
    finished: asyncio.Future[tuple[Any, BaseException | None]]
    state: Literal["queued", "running", "ended", "dropped", "lost"] = "queued"


class CallLoad(NamedTuple):
    """How many calls run, wait for a thread, and were given up and have not returned."""

    running: int = 0
    waiting: int = 0
    lost: int = 0


class CallThreads:
    """At most ``num_threads`` threads that run calls, and ``max_lost`` that were given up.

    Any number of event loops may share them. A thread ends when no call waits.
    """

    def __init__(self, num_threads: int = NUM_THREADS, max_lost: int = MAX_LOST) -> None:
        self._num_threads, self._max_lost = num_threads, max_lost
        self.reset()

    def reset(self) -> None:
        """Forget all calls: in a forked child, which has none of the threads."""
        self._lock = threading.Lock()
        self._queue: deque[ThreadCall] = deque()
        self._num_running = self._num_lost = 0

    @property
    def load(self) -> CallLoad:
        """The calls of now; each that runs or is lost has a thread."""
        with self._lock:
            waiting = sum(call.state == "queued" for call in self._queue)
            return CallLoad(self._num_running, waiting, self._num_lost)

    def submit(self, function: Callable[..., Any], *args: Any) -> ThreadCall:
        """Begin ``function(*args)``, or queue it. Called in an event loop.

        Raises:
            RolloutError: if too many calls were given up and have not returned.
        """
        loop = asyncio.get_running_loop()
        call = ThreadCall(function, args, loop.create_future(), loop.create_future())
        with self._lock:
            if self._num_lost >= self._max_lost:
                raise RolloutError(
                    f"{self._num_lost} calls of rewards or environments have not returned since "
                    "their timeout, and hold a thread each. Use reward_workers or a RewardPool, "
                    "which kill such calls, or raise the timeout."
                )
            if self._num_running >= self._num_threads:
                self._queue.append(call)
                return call
            self._begin(call)
        self._start_thread(call)
        return call

    def give_up(self, call: ThreadCall) -> None:
        """Make no use of ``call``: it leaves the queue, or its thread is lost."""
        following = None
        with self._lock:
            if call.state == "queued":
                call.state = "dropped"
            elif call.state == "running":
                call.state = "lost"
                self._num_running -= 1
                self._num_lost += 1
                following = self._take()
        if following is not None:
            self._start_thread(following)

    def _begin(self, call: ThreadCall) -> None:
        call.state = "running"
        self._num_running += 1

    def _take(self) -> ThreadCall | None:
        """The next call that somebody still waits for, if there is one."""
        while self._queue:
            call = self._queue.popleft()
            if call.state == "queued":
                self._begin(call)
                return call
        return None

    def _end(self, call: ThreadCall) -> ThreadCall | None:
        """Book the end of ``call``; returns the next one for this thread."""
        with self._lock:
            if call.state == "lost":
                self._num_lost -= 1
                return None
            call.state = "ended"
            self._num_running -= 1
            return self._take()

    def _start_thread(self, call: ThreadCall) -> None:
        thread = threading.Thread(target=self._run, args=(call,), name="sdp-call", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads; the next end of a call takes the queue on
            with self._lock:
                call.state = "ended"
                self._num_running -= 1
            settle(call.started, None)
            settle(call.finished, (None, error))

    def _run(self, call: ThreadCall | None) -> None:
        while call is not None:
            settle(call.started, None)
            value, failure = None, None
            try:
                value = call.function(*call.args)
            except BaseException as error:  # raised again where the call is awaited
                failure = error
            following = self._end(call)
            settle(call.finished, (value, failure))
            del value, failure
            call = following


THREADS = CallThreads()
os.register_at_fork(after_in_child=THREADS.reset)
