"""Runs Python in processes forked from one that has the libraries loaded: to load them takes 7 s.

Each runs as ``python -c`` would run it, as the first process of a session of its own. The server
runs no tensor operation, so a fork finds no thread that it would have to go without.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 100_000  # of a message


class ForkServer:
    """The client of one server. It is used by one thread."""

    def __init__(self) -> None:
        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(far.fileno())],
                pass_fds=[far.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._codes: dict[int, int] = {}

    def start(
        self,
        source: str,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> Forked:
        """Run ``source`` with ``arguments``; its streams are descriptors, which stay open here."""
        null = os.open(os.devnull, os.O_RDWR)
        ends = [null if end == subprocess.DEVNULL else end for end in (stdin, stdout, stderr)]
        order = {"source": source, "arguments": arguments, "env": dict(env or {})}
        try:
            socket.send_fds(self._control, [json.dumps(order).encode()], ends)
        finally:
            os.close(null)
        while "pid" not in (answer := self._hear()):
            pass
        return Forked(self, answer["pid"])

    def code_of(self, pid: int, timeout_s: float) -> int:
        """Its exit status, as that of a ``subprocess.Popen``."""
        deadline = time.monotonic() + timeout_s
        while pid not in self._codes:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._control], [], [], left_s)[0]:
                raise TimeoutError(f"process {pid} has not ended after {timeout_s:g} s")
            self._hear()
        return self._codes[pid]

    def close(self) -> None:
        """End the server."""
        self._control.close()
        self._process.kill()
        self._process.wait(60.0)

    def _hear(self) -> dict[str, Any]:
        answer = json.loads(self._control.recv(MOST_BYTES))
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer


@dataclass(frozen=True)
class Forked:
    """A process, and the group of processes that it leads."""

    server: ForkServer
    pid: int

    def wait(self, timeout_s: float) -> int:
        return self.server.code_of(self.pid, timeout_s)

    def kill(self) -> None:
        """Kill what is left of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


# The server ---------------------------------------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork what is ordered until the client is gone. The order, in a process that is to obey it."""
    running: dict[int, int] = {}  # process by the descriptor of its end
    while True:
        ready, _, _ = select.select([control, *running], [], [])
        for descriptor in set(running) & set(ready):
            pid = running.pop(descriptor)
            os.close(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(OSError):  # the client is gone
                control.send(json.dumps({"ended": pid, "code": code}).encode())
        if control in ready:
            data, ends, _, _ = socket.recv_fds(control, MOST_BYTES, 3)
            if not data:
                return None
            pid = os.fork()
            if pid == 0:
                for descriptor in (*running, control.detach()):
                    os.close(descriptor)
                begin(ends)
                return json.loads(data)
            for end in ends:
                os.close(end)
            running[os.pidfd_open(pid)] = pid
            control.send(json.dumps({"pid": pid}).encode())


def begin(ends: list[int]) -> None:
    """Be a session's first process, with streams of its own."""
    os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)


if __name__ == "__main__":
    import peft  # noqa: F401  (loaded here, once, like the others)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import support.kill_resume_run
    import support.metrics_ranks_run
    import support.quick_lightning
    import support.rollouts_on_ranks
    import support.trainers  # noqa: F401

    if (given := serve(socket.socket(fileno=int(sys.argv[1])))) is None:
        sys.exit()
    os.environ |= given["env"]
    tempfile.tempdir = None  # of the environment that the server had
    sys.argv = ["-c", *given["arguments"]]
    exec(compile(given["source"], "<script>", "exec"), {"__name__": "__main__"})
