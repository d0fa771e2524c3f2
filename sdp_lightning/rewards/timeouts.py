"""Calls of user functions, plain or async, with a timeout."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.call_threads import THREADS
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

    A plain function runs in one of a bounded number of daemon threads, so one that blocks stalls
    nothing else. Calls beyond that number wait, and their wait is not counted. A thread cannot be
    killed: past the timeout its result is ignored. ``RewardPool`` kills.

    Args:
        function: plain or async function.
        args: arguments of ``function``.
        timeout_s: longest run in seconds.
        what: subject of the error message.

    Raises:
        RolloutError: if it takes longer than ``timeout_s``, or raises what is no ``Exception``
            (``SystemExit``, ``KeyboardInterrupt``). Its own errors pass through.
    """
    deadline = asyncio.timeout(None)
    loop = asyncio.get_running_loop()

    def start() -> None:
        deadline.reschedule(loop.time() + timeout_s)

    try:
        async with deadline:
            if inspect.iscoroutinefunction(function):
                start()
                return await _awaited(function(*args), what)
            return await _in_thread(function, args, start, what)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise RolloutError(f"{what} took longer than {timeout_s} s.") from error


async def _in_thread(
    function: Callable[..., Any], args: tuple[Any, ...], start: Callable[[], None], what: str
) -> Any:
    call = THREADS.submit(function, *args)
    try:
        await call.started
        start()
        value, failure = await call.finished
    finally:
        THREADS.give_up(call)  # does nothing if it has ended
    if isinstance(failure, Exception):
        raise failure
    if failure is not None:  # it would end another thread than its own, or cancel the waiter
        _raise_as_error(failure, what)
    return await _awaited(value, what) if inspect.isawaitable(value) else value


async def _awaited(value: Awaitable[Any], what: str) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as error:  # either would end the event loop
        _raise_as_error(error, what)


def _raise_as_error(error: BaseException, what: str) -> NoReturn:
    how = (
        f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
    )
    raise RolloutError(f"{what} {how}.") from error
