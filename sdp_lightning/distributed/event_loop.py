"""Calls from other threads into an asyncio event loop, which may have ended by then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def call_in(
    loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object
) -> None:
    """Call ``function(*args)`` in the thread of ``loop``; do nothing if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def settle(future: asyncio.Future[T], outcome: T | BaseException) -> None:
    """Settle ``future`` from any thread with a result or an exception.

    Nothing happens if it is settled or cancelled before, or if its loop is closed.
    """
    call_in(future.get_loop(), _settle_now, future, outcome)


def _settle_now(future: asyncio.Future[T], outcome: T | BaseException) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
