"""The send gate: no request leaves while weights are being published.

Closed and drained by the trainer's thread, passed by requests in the event loop's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

from sdp_lightning.distributed.event_loop import call_in, settle
from sdp_lightning.errors import RolloutTimeout
from sdp_lightning.types import FinishReason

CANCEL_S = 5.0  # ending a cancelled request takes milliseconds, more on a busy machine


class SendGate:
    """Counts outstanding requests, and holds back new ones while it is closed.

    ``drain`` awaits a request that passed before ``close`` returned; a later one waits for
    ``open``. So a request sent under a version is admitted under it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._out: dict[asyncio.Task[FinishReason], asyncio.AbstractEventLoop] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._cancelled: set[asyncio.Task[FinishReason]] = set()
        self._busy_s, self._busy_since = 0.0, 0.0

    @property
    def busy_s(self) -> float:
        """Seconds so far with at least one outstanding request."""
        with self._changed:
            return self._busy_s + (time.monotonic() - self._busy_since if self._out else 0.0)

    @property
    def num_outstanding(self) -> int:
        """Number of outstanding requests."""
        return len(self._out)

    def close(self) -> None:
        """Hold back every request that has not passed yet."""
        with self._changed:
            self._is_open = False

    def open(self) -> None:
        """Let requests pass again."""
        with self._changed:
            self._is_open = True
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            settle(future, None)

    def drain(self, timeout_s: float) -> int:
        """Wait until all outstanding requests have returned; cancel those that are late.

        Args:
            timeout_s: seconds until requests are cancelled.

        Returns:
            Number of cancelled requests. Their unfinished tokens are discarded and sampled again.

        Raises:
            RolloutTimeout: if a cancelled request does not return.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._out and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            stragglers = list(self._out.items())
            self._cancelled.update(task for task, _ in stragglers)
            for task, loop in stragglers:
                call_in(loop, task.cancel)
            cancel_s = max(timeout_s, CANCEL_S)
            deadline = time.monotonic() + cancel_s
            while self._out:
                if (left := deadline - time.monotonic()) <= 0:
                    raise RolloutTimeout(
                        f"{len(self._out)} requests neither returned within {timeout_s:g} s nor "
                        f"ended within {cancel_s:g} s of being cancelled: the engine's generate() "
                        "ignores cancellation."
                    )
                self._changed.wait(left)
        return len(stragglers)

    async def send(self, request: Coroutine[Any, Any, FinishReason]) -> FinishReason:
        """Await ``request`` once the gate is open; ``"abort"`` if a drain cancelled it."""
        try:
            task = await self._pass(request)
        except BaseException:
            request.close()
            raise
        try:
            return await task
        except asyncio.CancelledError:
            if task in self._cancelled and task.cancelled() and not is_being_cancelled():
                return "abort"
            task.cancel()
            raise
        finally:
            with self._changed:
                self._out.pop(task, None)
                self._cancelled.discard(task)
                if not self._out:  # else a drain has more to wait for
                    self._busy_s += time.monotonic() - self._busy_since
                    self._changed.notify_all()

    async def _pass(self, request: Coroutine[Any, Any, FinishReason]) -> asyncio.Task[FinishReason]:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._is_open:
                    task = loop.create_task(request)
                    if not self._out:
                        self._busy_since = time.monotonic()
                    self._out[task] = loop
                    return task
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append(future)
            await future


def is_being_cancelled() -> bool:
    """Whether the current task is being cancelled, rather than one that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
