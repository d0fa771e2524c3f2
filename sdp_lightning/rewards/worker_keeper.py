"""The keeper of one worker: it talks with the trainer, and never runs the reward.

It forks the process that loads the reward (:mod:`~sdp_lightning.rewards.worker_reward`), which
forks another one for each call, with a connection of its own. The keeper passes calls on, and lets
one answer through for each: the answer must carry the nonce of its call, and the process must then
repeat a second one, with no byte before, between or after. Anything else ends the call, which
counts as crashed, and all that the reward left running.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping

from sdp_lightning.distributed.process_guard import descendants, kill, stop
from sdp_lightning.rewards import worker_reward
from sdp_lightning.rewards.worker_channel import (
    ANSWERED,
    ENDED,
    GIVE_UP,
    GOES_ON,
    LONGEST_ANSWER,
    TAG,
    WROTE,
    ForgedError,
    has_bytes,
    receive,
    send,
)

_EXIT_S = 1.0  # from the end of the connection to the exit status
_SWEEP_S = 4.0  # killed processes are gone by then, unless the kernel holds them
_COUNT_S = 0.1  # between two counts of processes, and of looks at the parent


class TrainerGoneError(BaseException):
    """The trainer closed the connection, or ended."""


class _GivenUp(Exception):
    """The trainer waits no more for the call that runs."""


class RewardGoneError(Exception):
    """The process that runs the reward has ended."""


class _TooManyProcesses(RewardGoneError):
    """The reward runs more processes than it may."""


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
        self._limit: int | None = None  # of processes
        self._count_at = 0.0
        self._forks, self._forked = False, b""  # whether calls are, and the nonce of one that runs
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
        """Load the reward, then pass calls on until one costs the process that loaded it.

        Raises:
            TrainerGoneError: if the trainer closes the connection, or ends.
            RewardGoneError: if the reward process ends or writes between two calls.
        """
        act = self._load
        while True:
            self._wait_for_a_call()
            tag, data = self._hear_trainer()
            try:
                if tag == GIVE_UP:  # the answer crossed with it
                    send(self._trainer, tag, GOES_ON)
                    continue
                answer = act(data)
            except _GivenUp:
                how, tag = "", GIVE_UP
            except ForgedError:
                how = WROTE
            except _TooManyProcesses:
                how = f"ran more than {self._limit} processes at once (limits.processes)"
            except (EOFError, OSError, RewardGoneError):
                how = self._how_it_ended()
            else:
                send(self._trainer, tag, ANSWERED + answer)
                act = self._call
                continue
            goes_on = self._recover()
            send(self._trainer, tag, (GOES_ON if goes_on else ENDED) + how.encode())
            if not goes_on:
                return

    def end(self) -> None:
        """Kill the reward process and all that it left running, and reap them."""
        deadline = time.monotonic() + _SWEEP_S
        if self._status is None or sys.platform != "linux":  # else its number may be another's
            kill(self._process)
        while time.monotonic() < deadline:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return  # all descendants were children of this process at last
            below = descendants(os.getpid())
            for end_it in (stop, kill):  # what is stopped forks no more
                for process in below:
                    end_it(process)
            self._wait_for_child(0.05)

    def _load(self, setup: bytes) -> bytes:
        self._limit = json.loads(setup)["limits"]["processes"]
        answer = self._ask(self._reward, setup)
        self._forks = answer == worker_reward.FORKS
        return answer

    def _call(self, data: bytes) -> bytes:
        if not self._forks:
            return self._ask(self._reward, data)
        connection, theirs = socket.socketpair()
        self._forked = os.urandom(TAG)
        with connection:
            with theirs:
                socket.send_fds(self._reward, [self._forked], [theirs.fileno()])
            answer = self._ask(connection, data)
            self._end_what_is_left()
            self._hear_of_the_end()
            if has_bytes(connection):
                raise ForgedError("bytes after the answer")
        return answer

    def _ask(self, connection: socket.socket, data: bytes) -> bytes:
        wait = functools.partial(self._wait, connection)
        nonce, last = os.urandom(TAG), os.urandom(TAG)
        send(connection, nonce, data, wait)
        _, answer = receive(connection, nonce, wait=wait, longest=LONGEST_ANSWER)
        send(connection, last, b"", wait)
        receive(connection, last, wait=wait, longest=0)
        if has_bytes(connection):
            raise ForgedError("bytes after the answer")
        return answer

    def _recover(self) -> bool:
        """End a forked call with all that is left of it; whether the next one can be forked."""
        if not self._forks or sys.platform != "linux":  # elsewhere it cannot be found
            return False
        try:
            self._end_what_is_left()
            if self._forked:
                self._hear_of_the_end()
        except (EOFError, OSError, ForgedError, _GivenUp, RewardGoneError):
            return False
        return self._status is None

    def _hear_of_the_end(self) -> int:
        """Exit status of a forked process that has ended, from the one that forked it."""
        wait = functools.partial(self._wait, self._reward)
        status = int(receive(self._reward, self._forked, wait=wait, longest=TAG)[1])
        self._forked = b""
        return status

    def _end_what_is_left(self) -> None:
        """End a forked call, which has answered, or can no more, and all that it left running."""
        deadline = time.monotonic() + _SWEEP_S
        while left := [each for each in descendants(os.getpid()) if each != self._process]:
            if time.monotonic() > deadline:
                raise RewardGoneError
            for end_it in (stop, kill):
                for process in left:
                    end_it(process)
            self._wait_for_child(0.05)
            self._reap()
            if self._status is None:
                os.kill(self._process, signal.SIGCONT)  # the call may have stopped it

    def _wait_for_a_call(self) -> None:
        while True:
            ready = self._poll({self._reward: select.POLLIN})
            self._reap()
            if self._status is not None or self._reward.fileno() in ready:
                raise RewardGoneError
            if self._trainer.fileno() in ready:
                return

    def _hear_trainer(self) -> tuple[bytes, bytes]:
        try:
            return receive(self._trainer)
        except (EOFError, ConnectionError):
            raise TrainerGoneError from None

    def _wait(self, connection: socket.socket, event: int) -> None:
        """Return when ``connection``, to the process that runs the call, is ready."""
        while True:
            ready = self._poll({self._reward: select.POLLIN} | {connection: event})
            if self._trainer.fileno() in ready:
                self._hear_trainer()
                raise _GivenUp
            if connection.fileno() in ready:
                return
            if self._reward.fileno() in ready:
                raise RewardGoneError  # the process of the call, or the one that forked it
            self._reap()
            if self._status is not None:
                raise RewardGoneError

    def _poll(self, connections: Mapping[socket.socket, int]) -> set[int]:
        poll = select.poll()
        for connection, event in connections.items():
            poll.register(connection, event)
        poll.register(self._trainer, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        ready = {number for number, _ in poll.poll(_COUNT_S * 1000)}
        if self._parent and os.getppid() != self._parent:
            raise TrainerGoneError
        if self._limit is not None and time.monotonic() >= self._count_at:
            self._count_at = time.monotonic() + _COUNT_S
            limit = self._limit + self._forks  # the process that forks runs nothing
            if len(descendants(os.getpid(), limit + 1)) > limit:
                raise _TooManyProcesses
        return ready

    def _wait_for_child(self, seconds: float) -> None:
        """Wait for the end of a child, or of a forked call, or ``seconds``."""
        reading = [self._wake, self._reward] if self._forked else [self._wake]
        select.select(reading, [], [], seconds)
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
        while (status := self._exit_status()) is None and time.monotonic() < deadline:
            self._wait_for_child(deadline - time.monotonic())
        if status is None:
            return "closed the connection of its process"
        if status >= 0:
            return f"ended its process with exit status {status}"
        return f"died of {signal.Signals(-status).name}"

    def _exit_status(self) -> int | None:
        """Exit status of the process that runs the call, or of the one that forks it."""
        self._reap()
        if self._status is None and self._forked and has_bytes(self._reward):
            with contextlib.suppress(EOFError, OSError, ForgedError, RewardGoneError):
                return self._hear_of_the_end()
        return self._status


def _on_child(*_: object) -> None:
    """Nothing: a signal with a handler is written into the wake-up socket."""


def _on_term(*_: object) -> None:
    raise TrainerGoneError
