"""The process of a worker that loads a reward once, then forks a process for each call.

The keeper (:mod:`~sdp_lightning.rewards.worker_main`) forks it. The first message is the setup, in
JSON; each call is the descriptor of a connection, on which the forked process is sent pickled
arguments. So code that a completion brings into a call changes nothing for later ones. Every answer
is JSON, so nothing that a reward made is unpickled elsewhere. Calls run on the main thread, where a
reward may use signals.

A process with threads, or with a CUDA context, cannot be forked: the calls of a reward that starts
them while it is loaded all run in the one process, as with ``fork_calls=False``.

Imports neither torch nor numpy, so a worker takes little memory beside its reward.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

from sdp_lightning.rewards.worker_channel import TAG, receive, send

if TYPE_CHECKING:
    from sdp_lightning.rewards.value import Score

_LONGEST_TEXT = 4000  # characters of an error or a traceback
_OURS = "sdp_lightning.errors."  # left out of messages
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_LIBC = ctypes.CDLL(None)
OUT_OF_MEMORY = b'{"out_of_memory": true}'  # made beforehand, while there is memory
FORKS = b'{"value": 1.0}'  # the answer to the setup if each call will be forked; else 0.0


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
    from sdp_lightning.rewards.worker_limits import WorkerLimits

    enter_worker_process()
    WorkerLimits(**setup["limits"]).enforce()
    function: Any = None

    def load() -> float:
        nonlocal function
        function = load_object(setup["spec"])
        return float(setup["fork_calls"] and _may_fork())

    def answer_call(connection: socket.socket) -> None:
        nonce, data = receive(connection)
        answer = _attempt(lambda: _call(function, data, setup["name"]))
        _send(connection, nonce, answer)

    answer = _attempt(load)
    _send(connection, nonce, answer)
    if answer == FORKS:
        _fork_calls(connection, answer_call)
    while True:
        answer_call(connection)


def _send(connection: socket.socket, nonce: bytes, answer: bytes) -> None:
    send(connection, nonce, answer)
    send(connection, receive(connection)[0], b"")  # the call is over


def _may_fork() -> bool:
    torch = sys.modules.get("torch")
    return threading.active_count() == 1 and not (torch and torch.cuda.is_initialized())


def _fork_calls(connection: socket.socket, answer_call: Callable[[socket.socket], None]) -> None:
    """Fork a process for each connection that the keeper sends; tell it how the process ended."""
    parent = os.getpid()
    gc.collect()
    gc.freeze()  # what is loaded is not copied by collections in the forked processes
    while True:
        nonce, descriptors, *_ = socket.recv_fds(connection, TAG, 1)
        if not nonce:
            raise EOFError("the other end is closed")
        with socket.socket(fileno=descriptors[0]) as call, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads of libraries, which know of forks
            child = os.fork()
            if child == 0:
                _run_call(call, parent, answer_call)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        send(connection, nonce, str(status).encode())


def _run_call(
    call: socket.socket, parent: int, answer_call: Callable[[socket.socket], None]
) -> NoReturn:
    try:
        os.setpgid(0, 0)
        call.set_inheritable(False)
        os.register_at_fork(after_in_child=call.close)
        _end_with(parent)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # its pool of threads was not forked
        answer_call(call)
        os._exit(0)
    finally:
        os._exit(1)


def _call(function: Callable[..., object], arguments: bytes, name: str) -> Score | list[Score]:
    from sdp_lightning.rewards.value import as_score, as_scores

    completion, row, *asked = pickle.loads(arguments)
    value = function(completion, row, **(asked[0] if asked else {}))
    if isinstance(value, Awaitable):
        value = _await(value)
    if isinstance(completion, list):
        return as_scores(value, name, len(completion))
    return as_score(value, name)


def _await(value: Awaitable[object]) -> object:
    import asyncio

    async def wait() -> object:
        return await value

    return asyncio.run(wait())


def _attempt(function: Callable[[], Score | list[Score]]) -> bytes:
    """The answer: a value, an error with its traceback, or that memory ran out."""
    from sdp_lightning.errors import InfrastructureError
    from sdp_lightning.rewards.foreign_code import take_note

    process = os.getpid()
    try:
        answer: dict[str, object] = {"value": function()}
        if note := take_note():
            answer["note"] = note[:_LONGEST_TEXT]
    except InfrastructureError as error:
        answer = {"infrastructure": error.cause[:_LONGEST_TEXT]}
    except MemoryError:
        answer = {}  # answered below, where the frames that hold the memory are gone
    except BaseException as error:  # raised by the pool; also SystemExit and KeyboardInterrupt
        message = traceback.format_exception_only(error)[-1].strip().removeprefix(_OURS)
        trace = "".join(traceback.format_exception(error))
        answer = {"error": message[:_LONGEST_TEXT], "traceback": trace[-_LONGEST_TEXT:]}
    if os.getpid() != process:
        os._exit(0)  # forked by the reward, and came back from it
    return json.dumps(answer).encode() if answer else OUT_OF_MEMORY


def _prepare(keeper: int) -> None:
    """End with the keeper, be the first that the kernel's OOM killer takes, and be closed.

    Closed: other processes of the user, like a program that the reward starts, may neither trace
    this one nor open its files. The processes that it forks are closed and taken first as well.
    """
    if sys.platform == "linux":
        _end_with(keeper)
        _LIBC.prctl(_PR_SET_DUMPABLE, 1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        _LIBC.prctl(_PR_SET_DUMPABLE, 0)


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also during a call into C
        if os.getppid() != parent:
            os._exit(1)
