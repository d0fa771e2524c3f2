"""Runs a command, and ends all that it started: when it ends, or when its starter asks or dies.

``python process_guard.py GRACE_S OUTPUT LIMIT COMMAND...``, with the standard library alone. The
starter holds the other end of standard input: it writes there, or closes it, to end the command; it
also closes when the starter is killed. OUTPUT is a file for at most LIMIT bytes of what the command
writes, the first and the last; ``-`` leaves its output where the guard's goes.

On Linux the guard is the subreaper of all that the command starts, so processes that called
``setsid`` are ended as well. Elsewhere its process group is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import signal
import subprocess
import sys
import time

NOT_FOUND = 127  # exit status if the command cannot be started, as a shell's

_POLL_S = 0.1
_KILL_S = 2.0  # killed processes are gone by then, unless the kernel holds them
_READ = 2**16  # bytes
_PROC = "/proc"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_IS_LINUX = sys.platform == "linux"


class KeptOutput:
    """A file of the first and the last bytes of an output, with a note on those between.

    Args:
        path: the file; it is made anew.
        limit: number of bytes that are kept.
    """

    def __init__(self, path: str, limit: int) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close
        self._room, self._most_last = limit - limit // 2, limit // 2
        self._last, self._num_left_out = bytearray(), 0

    def add(self, data: bytes) -> None:
        """Keep what is to be kept of the next bytes."""
        first, rest = data[: self._room], data[self._room :]
        self._room -= len(first)
        self._write(first)
        self._last += rest
        if len(self._last) > self._most_last + _READ:
            self._cut()

    def close(self) -> None:
        """Write the last bytes."""
        self._cut()
        if self._num_left_out:
            self._write(b"\n... %d bytes left out ...\n" % self._num_left_out)
        self._write(bytes(self._last))
        self._file.close()

    def _cut(self) -> None:
        surplus = max(len(self._last) - self._most_last, 0)
        self._num_left_out += surplus
        del self._last[:surplus]

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk ends no command
            self._file.write(data)


class Guard:
    """A command and all that it started.

    Args:
        command: the program and its arguments.
        output: what the command writes; None leaves it alone.

    Raises:
        OSError: if the command cannot be started.
    """

    def __init__(self, command: list[str], output: KeptOutput | None = None) -> None:
        self._starter, self._output, self._status = os.getppid(), output, None
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, _on_child)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        if _IS_LINUX:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._reading: int | None = None
        ends = None if output is None else os.pipe()
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if ends is None else ends[1],
                stderr=None if ends is None else subprocess.STDOUT,
                preexec_fn=functools.partial(_prepare, os.getpid()),
                process_group=0,
            )
        finally:
            if ends is not None:
                os.close(ends[1])
        if ends is not None:
            self._reading = ends[0]
            os.set_blocking(ends[0], False)

    def wait(self) -> int | None:
        """The command's exit status, or minus its signal; None once it is to be ended."""
        while self._status is None:
            stdin = sys.stdin.fileno()
            # A process that the starter has forked may hold the other end open.
            if stdin in self._tick([stdin]) or os.getppid() != self._starter:
                return None
        return self._status

    def end(self, grace_s: float) -> int:
        """End all that is left, by SIGTERM and after the grace by SIGKILL; the exit status."""
        if _IS_LINUX:
            for process in descendants(os.getpid()):
                _send(process, signal.SIGTERM)
        else:
            self._signal_group(signal.SIGTERM)
        if not self._is_gone(grace_s):
            deadline = time.monotonic() + _KILL_S
            while time.monotonic() < deadline and not self._is_gone(0.05):
                self._kill()
        self._read()
        return -signal.SIGKILL if self._status is None else self._status

    def _kill(self) -> None:
        below = descendants(os.getpid())
        for end_it in (stop, kill):
            for process in below:
                end_it(process)
        if not _IS_LINUX:
            self._signal_group(signal.SIGKILL)

    def _is_gone(self, within_s: float) -> bool:
        """Whether nothing is left; waits for it."""
        deadline = time.monotonic() + within_s
        while self._is_left():
            if time.monotonic() >= deadline:
                return False
            self._tick([])
        return True

    def _is_left(self) -> bool:
        if self._reap():
            return True
        if _IS_LINUX:
            return False  # all descendants were children of this process at last
        try:
            os.killpg(self._child.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)

    def _tick(self, others: list[int]) -> list[int]:
        """Wait ``_POLL_S`` for an event; what is ready, after ends and output are dealt with."""
        reading = [] if self._reading is None else [self._reading]
        ready, _, _ = select.select([self._wake, *reading, *others], [], [], _POLL_S)
        self._read()
        self._reap()
        return ready

    def _read(self) -> None:
        """Take the output that is there, at most what a pipe holds and a little more."""
        for _ in range(32):
            if self._reading is None or self._output is None:
                return
            try:
                data = os.read(self._reading, _READ)
            except BlockingIOError:
                return
            self._output.add(data)
            if not data:
                os.close(self._reading)
                self._reading = None

    def _reap(self) -> bool:
        """Reap what has ended; whether a child is left."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, _READ):
                pass
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child.pid:
                    self._status = self._child.returncode = os.waitstatus_to_exitcode(ended[1])
            return True
        return False


def main(grace_s: float, path: str, limit: int, command: list[str]) -> int:
    """Run ``command`` in a process group of its own; returns its exit status when all have ended.

    Args:
        grace_s: seconds between SIGTERM and SIGKILL.
        path: file for its output, or ``-``.
        limit: bytes of the output that are kept.
        command: the program and its arguments.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the starter, or its death, ends this
    output = None if path == "-" else KeptOutput(path, limit)
    try:
        guard = Guard(command, output)
        guard.wait()
        status = guard.end(grace_s)
    except OSError as error:
        said = f"{command[0]} cannot be started: {error.strerror}\n"
        (sys.stderr.buffer.write if output is None else output.add)(said.encode())
        status = NOT_FOUND
    if output is not None:
        output.close()
    return status if status >= 0 else 128 - status  # as a shell reports signals


def descendants(root: int, at_most: int | None = None) -> list[int]:
    """Process ids of all processes below ``root``, parents first, with those nobody waited for.

    They are read from ``/proc``; none are found where there is none (macOS).

    Args:
        root: process id.
        at_most: number after which the search ends.
    """
    known = None if os.path.exists(f"{_PROC}/{root}/task/{root}/children") else _children_of_all()
    found = [root]
    for process in found:  # which grows meanwhile
        found += _children(process) if known is None else known.get(process, [])
        if at_most is not None and len(found) > at_most:
            break
    return found[1:]


def kill_all_with(variable: str) -> None:
    """Kill every process of this user that was started with ``NAME=value`` in its environment.

    It finds what a guard can no more end that was killed itself (Linux).
    """
    for _ in range(100):  # what is killed may have forked before it was stopped
        found = [process for process in _all() if variable.encode() in _environment(process)]
        for end_it in (stop, kill):
            for process in found:
                end_it(process)
        if not found:
            return
        time.sleep(_POLL_S / 10)


def kill(process: int) -> None:
    """Kill a process and its process group."""
    for kill_it in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill_it(process, signal.SIGKILL)


def stop(process: int) -> None:
    """Stop a process, which then forks no more."""
    _send(process, signal.SIGSTOP)


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _children(process: int) -> list[int]:
    numbers: list[int] = []
    with contextlib.suppress(OSError):  # it, or a thread of it, has ended meanwhile
        for thread in os.listdir(f"{_PROC}/{process}/task"):
            with open(f"{_PROC}/{process}/task/{thread}/children") as file:
                numbers += map(int, file.read().split())
    return numbers


def _all() -> list[int]:
    names = os.listdir(_PROC) if os.path.isdir(_PROC) else []
    return [int(name) for name in names if name.isdecimal() and int(name) != os.getpid()]


def _environment(process: int) -> list[bytes]:
    with contextlib.suppress(OSError), open(f"{_PROC}/{process}/environ", "rb") as file:
        return file.read().split(b"\0")
    return []  # it has ended, or is another user's


def _children_of_all() -> dict[int, list[int]]:
    """The children of every process, by its id: for kernels without ``children`` files."""
    children: dict[int, list[int]] = {}
    for process in _all():
        with contextlib.suppress(OSError), open(f"{_PROC}/{process}/stat", errors="replace") as f:
            parent = int(f.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(process)
    return children


def _on_child(*_: object) -> None:
    """Nothing: a signal with a handler is written into the wake-up pipe."""


def _prepare(guard: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if _IS_LINUX:  # in case this process is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
