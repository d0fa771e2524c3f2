"""Calls of user functions, plain or async, with a timeout."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.value import as_reward


async def call_reward(function: Callable[..., Any], *args: Any, timeout_s: float) -> float:
    """The reward ``function(*args)``, by :func:`call_with_timeout`.

    Raises:
        RolloutError: if it takes longer than ``timeout_s``, or returns no finite number.
    """
    # foreign: a callable may have no name
    name = str(getattr(function, "__name__", function))
    value = await call_with_timeout(function, *args, timeout_s=timeout_s, what=f"reward {name!r}")
    return as_reward(value, name)


async def call_with_timeout(
    function: Callable[..., Any], *args: Any, timeout_s: float, what: str
) -> Any:
    """The result of ``function(*args)``, awaited if it is async.

    A plain function runs in a daemon thread of its own, so one that blocks stalls nothing else. A
    thread cannot be killed: past the timeout its result is ignored. ``RewardPool`` kills.

    Args:
        function: plain or async function.
        args: arguments of ``function``.
        timeout_s: longest run in seconds.
        what: subject of the error message.

    Raises:
        RolloutError: if it takes longer than ``timeout_s``. Its own errors pass through.
    """
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            if inspect.iscoroutinefunction(function):
                return await function(*args)
            return await _in_thread(function, *args)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise RolloutError(f"{what} took longer than {timeout_s} s.") from error


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    future: asyncio.Future[tuple[Any, Exception | None]]
    future = asyncio.get_running_loop().create_future()

    def work() -> None:
        value, failure = None, None
        try:
            value = function(*args)
        except Exception as error:  # raised again where the reward is awaited
            failure = error
        except SystemExit as error:  # ends this thread alone: the call would seem to hang
            failure = RolloutError(f"it called sys.exit({error.code!r}).")
        settle(future, (value, failure))  # a pair: a future takes no StopIteration

    threading.Thread(target=work, name="sdp-call", daemon=True).start()
    value, failure = await future
    if failure is not None:
        raise failure
    return await value if inspect.isawaitable(value) else value
