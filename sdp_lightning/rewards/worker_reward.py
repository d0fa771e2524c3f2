"""The process of a worker that loads a reward once, then answers calls, one at a time.

The keeper (:mod:`~sdp_lightning.rewards.worker_main`) forks it. The first message is the setup, in
JSON; the others are pickled arguments. Every answer is JSON, so nothing that a reward made is
unpickled elsewhere. Calls run on the main thread, where a reward may use signals.

Imports neither torch nor numpy, so a worker takes little memory beside its reward.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from sdp_lightning.rewards.worker_channel import receive, send

_LONGEST_TEXT = 4000  # characters of an error or a traceback
_OURS = "sdp_lightning.errors."  # left out of messages
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
OUT_OF_MEMORY = b'{"out_of_memory": true}'  # made beforehand, while there is memory


def run(connection: socket.socket, keeper: int) -> NoReturn:
    """Serve the keeper until one of both ends.

    Args:
        connection: socket to the keeper. Children of this process do not inherit it.
        keeper: process id of the keeper, with which this process ends (on Linux).
    """
    try:
        os.setpgid(0, 0)  # what kills its own group does not reach the keeper
        _prepare(keeper)
        os.register_at_fork(after_in_child=connection.close)
        _serve(connection)
    except (EOFError, ConnectionError):
        os._exit(0)
    finally:
        os._exit(1)


def _serve(connection: socket.socket) -> None:
    nonce, data = receive(connection)
    setup: dict[str, Any] = json.loads(data)
    sys.path[:] = setup["path"]
    from sdp_lightning.config.import_path import load_object
    from sdp_lightning.rewards.foreign_code import enter_worker_process

    enter_worker_process()
    _limit_resources(setup["memory_bytes"])
    function: Any = None

    def load() -> float:
        nonlocal function
        function = load_object(setup["spec"])
        return 0.0

    process, answer = os.getpid(), _attempt(load)
    while True:
        if os.getpid() != process:
            os._exit(0)  # forked by the reward, and came back from it
        send(connection, nonce, answer)
        send(connection, receive(connection)[0], b"")  # the call is over
        nonce, data = receive(connection)
        answer = _attempt(lambda given=data: _call(function, given, setup["name"]))


def _call(function: Callable[..., object], arguments: bytes, name: str) -> float:
    from sdp_lightning.rewards.value import as_reward

    value = function(*pickle.loads(arguments))
    if isinstance(value, Awaitable):
        value = _await(value)
    return as_reward(value, name)


def _await(value: Awaitable[object]) -> object:
    import asyncio

    async def wait() -> object:
        return await value

    return asyncio.run(wait())


def _attempt(function: Callable[[], float]) -> bytes:
    """The answer: a value, an error with its traceback, or that memory ran out."""
    try:
        return json.dumps({"value": function()}).encode()
    except MemoryError:
        pass  # answered below, where the frames that hold the memory are gone
    except BaseException as error:  # raised by the pool; also SystemExit and KeyboardInterrupt
        message = traceback.format_exception_only(error)[-1].strip().removeprefix(_OURS)
        trace = "".join(traceback.format_exception(error))
        answer = {"error": message[:_LONGEST_TEXT], "traceback": trace[-_LONGEST_TEXT:]}
        return json.dumps(answer).encode()
    return OUT_OF_MEMORY


def _limit_resources(memory_bytes: int | None) -> None:
    """Bound memory, and write no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        # Data and not address space: libraries reserve more addresses than they ever use.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _prepare(keeper: int) -> None:
    """End with the keeper, be the first that the kernel's OOM killer takes, and be closed.

    Closed: other processes of the user, like a program that the reward starts, may neither trace
    this one nor open its files.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also during a call into C
    if os.getppid() != keeper:
        os._exit(1)
    libc.prctl(_PR_SET_DUMPABLE, 1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    libc.prctl(_PR_SET_DUMPABLE, 0)
