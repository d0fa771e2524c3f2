"""A worker process seen from the trainer: start it, call it with a deadline, kill it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards import worker_main

Kind = Literal["value", "raised", "timed_out", "out_of_memory", "crashed"]

_KILL_S = 5.0  # a killed process is gone by then, unless the kernel holds it
_EXIT_S = 1.0  # between its end of the connection and its exit status


@dataclass(frozen=True)
class Verdict:
    """How one call ended: with a value, with an error of the reward, or by killing its process.

    Attributes:
        detail: what happened, as the end of a sentence about the reward; empty for a value.
        traceback: of the reward's own error.
    """

    kind: Kind
    value: float = 0.0
    detail: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process needs to know.

    Attributes:
        spec: where the reward is, for ``load_object``.
        name: of the reward, in messages.
        memory_bytes: the most data memory of the process; None is no bound.
        start_s: the longest that starting it and loading the reward may take.
    """

    spec: str
    name: str
    memory_bytes: int | None
    start_s: float


class WorkerProcess:
    """A process that answers one call at a time, until one call ends it.

    Only ``kill`` may be called from any thread. It dies with the thread that made it (on Linux).

    Raises:
        RolloutError: if the process cannot start, or cannot load the reward.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._connection, theirs = socket.socketpair()
        with theirs:
            numbers = [str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(worker_main.__file__)), *numbers],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints stays out of what the trainer prints
                pass_fds=[theirs.fileno()],
                process_group=0,  # killed with its children; Ctrl-C is for the trainer
            )
        self._is_killed = False

    def load(self) -> None:
        """Load the reward. ``RolloutError`` if it takes too long, raises, or ends the process."""
        settings = self._settings
        setup = asdict(settings) | {"path": [str(path) for path in sys.path]}
        verdict = self.call(json.dumps(setup).encode(), settings.start_s)
        if verdict.kind != "value":
            self.close()
            raise RolloutError(
                f"reward {settings.spec!r} {verdict.detail} while a worker process loaded it "
                f"(start_s={settings.start_s}, memory_bytes={settings.memory_bytes}).\n"
                f"{verdict.traceback}".rstrip()
            )

    @property
    def is_alive(self) -> bool:
        """Whether it can be called."""
        return not self._is_killed and self._process.poll() is None

    def call(self, arguments: bytes, timeout_s: float) -> Verdict:
        """Send ``arguments`` and wait for the answer; unless there is one the process is killed."""
        deadline = time.monotonic() + timeout_s
        try:
            worker_main.send(self._connection, arguments, deadline)
            answer: dict[str, Any] = json.loads(worker_main.receive(self._connection, deadline))
        except TimeoutError:
            verdict = Verdict("timed_out", detail=f"took longer than {timeout_s} s")
        except (EOFError, OSError):
            verdict = Verdict("crashed", detail=self._how_it_ended())
        except ValueError:
            verdict = Verdict("crashed", detail="wrote into the connection of its process")
        else:
            if "value" in answer:
                return Verdict("value", answer["value"])
            if "error" in answer:
                return Verdict("raised", 0.0, f"raised {answer['error']}", answer["traceback"])
            limit = self._settings.memory_bytes
            verdict = Verdict("out_of_memory", detail=f"ran out of memory (memory_bytes={limit})")
        self.close()
        return verdict

    def kill(self) -> None:
        """End the process and its children at once; a call in another thread ends with them."""
        if self._is_killed:
            return  # the number may be another process's by now
        self._is_killed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a dead group
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """``kill``, and let go of what is left; for the thread that made it."""
        self.kill()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_S)

    def forget(self) -> None:
        """In a forked child: it is not this process's to wait for or to kill."""
        self._connection.close()
        self._process.returncode = 0

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "closed the connection of its process"
        if status >= 0:
            return f"ended its process with exit status {status}"
        return f"died of {signal.Signals(-status).name}"
