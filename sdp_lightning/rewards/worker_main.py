"""One worker process of a reward pool: loads a reward once, then answers calls, one at a time.

``python worker_main.py SOCKET_FD PARENT_PID``, which
:class:`~sdp_lightning.rewards.worker_process.WorkerProcess` starts. Each message is its length and
its bytes. The first one is the setup, in JSON; the others are pickled arguments. Every answer is
JSON, so nothing that a reward made is unpickled by the trainer. Calls run on the main thread,
where a reward may use signals.

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
import struct
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

_HEADER = struct.Struct("!Q")
_CHUNK = 2**20
_LONGEST_TEXT = 4000  # characters of an error or a traceback
_OURS = "sdp_lightning.errors."  # left out of messages
_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 1.0
OUT_OF_MEMORY = b'{"out_of_memory": true}'  # made beforehand, while there is memory


def send(connection: socket.socket, data: bytes, deadline: float | None = None) -> None:
    """Send one message. ``TimeoutError`` at the deadline (monotonic seconds)."""
    _limit(connection, deadline)
    connection.sendall(_HEADER.pack(len(data)) + data)


def receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    """The next message. ``EOFError`` if the other end is closed, ``TimeoutError`` if it is late."""
    (size,) = _HEADER.unpack(_read(connection, _HEADER.size, deadline))
    return _read(connection, size, deadline)


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        _limit(connection, deadline)
        part = connection.recv(min(size - len(data), _CHUNK))
        if not part:
            raise EOFError("the other end is closed")
        data += part
    return bytes(data)


def _limit(connection: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("past the deadline")
    connection.settimeout(left)


def main(descriptor: int, parent: int) -> None:
    """Serve until the other end closes; then end the whole process group."""
    _die_with(parent)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.close)
    try:
        _serve(connection)
    except (EOFError, ConnectionError):
        os.killpg(0, signal.SIGKILL)  # and all that the reward left running


def _serve(connection: socket.socket) -> None:
    setup: dict[str, Any] = json.loads(receive(connection))
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
        send(connection, answer)
        arguments = receive(connection)
        answer = _attempt(lambda given=arguments: _call(function, given, setup["name"]))


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
    """Bound memory, write no core files, and be the first that the kernel's OOM killer takes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        # Data and not address space: libraries reserve more addresses than they ever use.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _die_with(parent: int) -> None:
    """Be killed when the process (the thread, on Linux) that started this one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also during a call into C
        if os.getppid() != parent:
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(_PARENT_CHECK_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
