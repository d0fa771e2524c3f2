"""Calls of user functions, plain or async, with a timeout; long work is done aside of the loop."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards.call_threads import THREADS
from sdp_lightning.rewards.value import Score, as_score, as_scores

LONG = 20_000  # characters or items: about 10 ms of tokenizing, and more than a thread's start
_LONG_CALL_S = 600.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class CallTimeout(RolloutError):
    """A call took longer than it may."""


def is_long(value: object) -> bool:
    """Whether ``value`` has more than ``LONG`` characters and items; no more are counted."""
    left, stack = LONG, [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str | bytes | Mapping | list | tuple):
            left -= len(part)  # pyright: ignore[reportUnknownArgumentType] # any items will do
        if left < 0:
            return True
        if isinstance(part, Mapping):
            stack += part.values()
        elif isinstance(part, list | tuple):
            stack += part
    return False


async def call_aside_if_long(
    what: str,
    value: object,
    function: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """The result of ``function``, in a thread if ``value`` is long: others' rollouts go on.

    Args:
        what: what is done, as the subject of a sentence.
        value: what ``function`` works on.
        function: plain function whose time grows with ``value``.
        args: arguments of ``function``.
        kwargs: further arguments.

    Raises:
        RolloutError: if a thread takes longer than 600 s.
    """
    if not is_long(value):
        return function(*args, **kwargs)
    call = functools.partial(function, *args, **kwargs)
    return await call_with_timeout(call, timeout_s=_LONG_CALL_S, what=what)


async def call_reward(
    function: Callable[..., Any], *args: Any, timeout_s: float, **asked: Any
) -> Score | list[Score]:
    """The reward ``function(*args, **asked)``, by :func:`call_with_timeout`.

    Args:
        function: the reward.
        args: a completion, or the list of a group's, and the row.
        timeout_s: seconds that it may take.
        asked: what it asks for by name.

    Returns:
        A float, or floats by name; a list of them for a list of completions.

    Raises:
        RolloutError: if it takes longer than ``timeout_s``, or returns no finite number.
    """
    # foreign: a callable may have no name
    name = str(getattr(function, "__name__", function))
    call = functools.partial(function, **asked) if asked else function
    what, setting = f"reward {name!r}", " (reward_timeout_s)"
    limits: Any = {"timeout_s": timeout_s, "what": what, "setting": setting}
    value = await call_with_timeout(call, *args, **limits)
    if args and isinstance(args[0], list):
        return as_scores(value, name, len(cast("list[str]", args[0])))
    return as_score(value, name)


async def call_with_timeout(
    function: Callable[..., Any], *args: Any, timeout_s: float, what: str, setting: str = ""
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
        setting: what it says behind the seconds.

    Raises:
        CallTimeout: if it takes longer than ``timeout_s``.
        RolloutError: if it raises what is no ``Exception``
            (``SystemExit``, ``KeyboardInterrupt``), or what means something else to its caller
            (``TimeoutError``, ``StopIteration``). Its other errors pass through.
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
            raise RolloutError(
                f"{what} raised {error!r} itself: a deadline of its own, not the {timeout_s} s "
                f"that it is given{setting}."
            ) from error
        raise CallTimeout(f"{what} took longer than {timeout_s} s{setting}.") from error


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
    if isinstance(failure, Exception) and not isinstance(failure, StopIteration):
        raise failure
    # Others would end another thread than their own, cancel the waiter, or end its coroutine.
    if failure is not None:
        _raise_as_error(failure, what)
    return await _awaited(value, what) if inspect.isawaitable(value) else value


async def _awaited(value: Awaitable[Any], what: str) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as error:  # either would end the event loop
        _raise_as_error(error, what)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # from outside, or by the deadline
            raise
        _raise_as_error(error, what)


def _raise_as_error(error: BaseException, what: str) -> NoReturn:
    how = (
        f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
    )
    raise RolloutError(f"{what} {how}.") from error
