"""An event loop whose clock is virtual: when nothing is ready it jumps to the next timer."""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable
from typing import Any

from sdp_lightning.errors import RolloutError


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs coroutines without waiting for any time to pass; ``time()`` begins at 0 s.

    Everything happens in one thread, in the order of the timers, so a run is deterministic. It
    awaits no files and no other thread: with nothing ready and no timer it raises ``RolloutError``.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self._advance))

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """``call_soon``, since there is one thread only."""
        return self.call_soon(callback, *args, context=context)

    def _advance(self, seconds: float) -> None:
        self._now += seconds


class _Jump(selectors.SelectSelector):
    """Waits for no file: the time that it should wait passes at once."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RolloutError(
                "the virtual run stands still: nothing is ready and no timer is set. Something "
                "in it waits for a thread, a file or an event that never comes."
            )
        self._advance(max(0.0, timeout))
        return []
