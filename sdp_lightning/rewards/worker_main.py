"""The keeper of one worker: it talks with the trainer, and never runs the reward.

``main(SOCKET_FD, PARENT_PID)`` runs in the process that
:class:`~sdp_lightning.rewards.worker_process.WorkerProcess` starts. It forks the process that loads
and calls the reward (:mod:`~sdp_lightning.rewards.worker_reward`), passes calls on, and lets one
answer through for each: the answer must carry the nonce of its call, and the reward process must
then repeat a second one, with no byte before, between or after. Anything else ends the worker, and
its call counts as crashed.

The keeper is the subreaper of all that the reward leaves running (Linux), so children that
called ``setsid`` end with the worker as well. It ends when the trainer's end of the socket closes,
and when the thread that started it ends (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sdp_lightning.rewards import worker_reward
from sdp_lightning.rewards.worker_channel import (
    LONGEST_ANSWER,
    TAG,
    WROTE,
    ForgedError,
    number_tag,
    receive,
    send,
)

ANSWERED, ENDED = b"=", b"!"  # first byte of what the trainer gets for a call
LOST_BETWEEN_CALLS = 75  # exit status: the reward process ended or wrote while it was not called

_EXIT_S = 1.0  # from the end of the connection to the exit status
_SWEEP_S = 4.0  # killed processes are gone by then, unless the kernel holds them
_PARENT_CHECK_MS = 1000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36


class _TrainerGone(BaseException):
    """The trainer closed the connection, or ended."""


class _RewardGone(Exception):
    """The process that runs the reward has ended."""


class Keeper:
    """One reward process and the way to it."""

    def __init__(self, trainer: socket.socket, parent: int) -> None:
        self._trainer, self._parent = trainer, parent
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, _on_child)
        signal.signal(signal.SIGTERM, _on_term)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._reward, theirs = socket.socketpair()
        self._status: int | None = None
        self._process = os.fork()
        if self._process == 0:
            signal.set_wakeup_fd(-1)
            for connection in (trainer, self._wake, wake, self._reward):
                connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            worker_reward.run(theirs, os.getppid())
        theirs.close()
        self._wake_end = wake
        with contextlib.suppress(OSError):  # it has done so itself, or has ended
            os.setpgid(self._process, self._process)

    def serve(self) -> None:
        """Pass calls on until one costs the reward process.

        Raises:
            _TrainerGone: if the trainer closes the connection, or ends.
            _RewardGone: if the reward process ends or writes between two calls.
        """
        while True:
            self._wait_for_a_call()
            try:
                tag, data = receive(self._trainer)
            except (EOFError, ConnectionError):
                raise _TrainerGone from None
            try:
                answer = self._call(data)
            except ForgedError:
                how = WROTE
            except (EOFError, OSError, _RewardGone):
                how = self._how_it_ended()
            else:
                send(self._trainer, tag, ANSWERED + answer)
                continue
            send(self._trainer, tag, ENDED + how.encode())
            return

    def end(self) -> None:
        """Kill the reward process and all that it left running, and reap them."""
        deadline = time.monotonic() + _SWEEP_S
        if self._status is None or sys.platform != "linux":  # else its number may be another's
            _kill(self._process)
        while time.monotonic() < deadline:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return  # all descendants were children of this process at last
            for process in _descendants(os.getpid()):
                _kill(process)
            self._wait_for_child(0.05)

    def _call(self, data: bytes) -> bytes:
        nonce, last = os.urandom(TAG), os.urandom(TAG)
        send(self._reward, nonce, data, self._wait)
        _, answer = receive(self._reward, nonce, wait=self._wait, longest=LONGEST_ANSWER)
        send(self._reward, last, b"", self._wait)
        receive(self._reward, last, wait=self._wait, longest=0)
        if _has_bytes(self._reward):
            raise ForgedError("bytes after the answer")
        return answer

    def _wait_for_a_call(self) -> None:
        while True:
            ready = self._poll(self._reward, select.POLLIN)
            self._reap()
            if self._status is not None or self._reward.fileno() in ready:
                raise _RewardGone
            if self._trainer.fileno() in ready:
                return

    def _wait(self, event: int) -> None:
        """Return when the reward's connection is ready."""
        while True:
            ready = self._poll(self._reward, event)
            if self._trainer.fileno() in ready:
                raise _TrainerGone  # it says nothing during a call
            if self._reward.fileno() in ready:
                return
            self._reap()
            if self._status is not None:
                raise _RewardGone

    def _poll(self, reward: socket.socket, event: int) -> set[int]:
        poll = select.poll()
        poll.register(reward, event)
        poll.register(self._trainer, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        ready = {number for number, _ in poll.poll(_PARENT_CHECK_MS)}
        if self._parent and os.getppid() != self._parent:
            raise _TrainerGone
        return ready

    def _wait_for_child(self, seconds: float) -> None:
        """Wait for the end of a child, or ``seconds``."""
        select.select([self._wake], [], [], seconds)
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass

    def _reap(self) -> None:
        self._drain()
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._process:
                    self._status = os.waitstatus_to_exitcode(ended[1])

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + _EXIT_S
        self._reap()
        while self._status is None and time.monotonic() < deadline:
            self._wait_for_child(deadline - time.monotonic())
            self._reap()
        if self._status is None:
            return "closed the connection of its process"
        if self._status >= 0:
            return f"ended its process with exit status {self._status}"
        return f"died of {signal.Signals(-self._status).name}"


def main(descriptor: int, parent: int) -> None:
    """Serve the trainer until the worker ends. Never returns.

    Args:
        descriptor: file descriptor of the socket to the trainer.
        parent: process id of the trainer; 0 if it has no number here (in a sandbox).
    """
    notes: list[str] = []
    if sys.platform == "linux":
        notes = _prepare_linux(parent)
    else:
        notes.append("children of a reward that call setsid outlive it: only Linux finds them.")
    status = 0
    trainer = socket.socket(fileno=descriptor)
    trainer.set_inheritable(False)
    keeper = Keeper(trainer, parent)
    try:
        send(trainer, number_tag(0), json.dumps(notes).encode())
        keeper.serve()
    except _RewardGone:
        status = LOST_BETWEEN_CALLS
    except (_TrainerGone, ConnectionError):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.end()
        os._exit(status)


def _prepare_linux(parent: int) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent and os.getppid() != parent:
        os._exit(1)
    libc.prctl(_PR_SET_DUMPABLE, 0)  # other processes of the user may not open its files
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0:
        return []
    return ["children of a reward that call setsid outlive it: this kernel has no subreaper."]


def _on_child(*_: object) -> None:
    """Nothing: a signal with a handler is written into the wake-up socket."""


def _on_term(*_: object) -> None:
    raise _TrainerGone


def _has_bytes(connection: socket.socket) -> bool:
    """Whether something was written that nobody has read; the end of the connection is nothing."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except (BlockingIOError, ConnectionError):
        return False


def _kill(process: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process, signal.SIGKILL)


def _descendants(root: int) -> Iterator[int]:
    """Process ids of all processes below ``root``; none where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    below = list(children.get(root, ()))
    for process in below:
        below.extend(children.get(process, ()))
        yield process
