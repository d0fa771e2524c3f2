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

OutcomeKind = Literal["value", "raised", "timed_out", "out_of_memory", "crashed"]

_KILL_S = 5.0  # a killed process is gone by then, unless the kernel holds it
_EXIT_S = 1.0  # from the end of the connection to the exit status


@dataclass(frozen=True)
class CallOutcome:
    """How one call ended: with a value, with an error of the reward, or by killing its process.

    Attributes:
        detail: what happened, as the end of a sentence about the reward; empty for a value.
        traceback: traceback of the reward's own error; empty for other outcomes.
    """

    kind: OutcomeKind
    value: float = 0.0
    detail: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker process.

    Attributes:
        spec: import path of the reward, for ``load_object``.
        name: name of the reward in messages.
        memory_bytes: largest data memory of the process; None is no bound.
        start_s: longest start in seconds, with loading the reward.
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
        self._connection, worker_end = socket.socketpair()
        with worker_end:
            arguments = [str(worker_end.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(worker_main.__file__)), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # prints of a reward stay out of the trainer's stdout
                pass_fds=[worker_end.fileno()],
                process_group=0,  # killed with its children; Ctrl-C is for the trainer
            )
        self._is_killed = False

    def load(self) -> None:
        """Load the reward. ``RolloutError`` if it takes too long, raises, or ends the process."""
        settings = self._settings
        setup = asdict(settings) | {"path": [str(path) for path in sys.path]}
        outcome = self.call(json.dumps(setup).encode(), settings.start_s)
        if outcome.kind != "value":
            self.close()
            raise RolloutError(
                f"reward {settings.spec!r} {outcome.detail} while a worker process loaded it "
                f"(start_s={settings.start_s}, memory_bytes={settings.memory_bytes}).\n"
                f"{outcome.traceback}".rstrip()
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process can be called."""
        return not self._is_killed and self._process.poll() is None

    def call(self, arguments: bytes, timeout_s: float) -> CallOutcome:
        """Send ``arguments`` and wait for the answer. Without one the process is killed."""
        deadline = time.monotonic() + timeout_s
        try:
            worker_main.send(self._connection, arguments, deadline)
            answer: dict[str, Any] = json.loads(worker_main.receive(self._connection, deadline))
        except TimeoutError:
            outcome = CallOutcome("timed_out", detail=f"took longer than {timeout_s} s")
        except (EOFError, OSError):
            outcome = CallOutcome("crashed", detail=self._how_it_ended())
        except ValueError:
            outcome = CallOutcome("crashed", detail="wrote into the connection of its process")
        else:
            if "value" in answer:
                return CallOutcome("value", answer["value"])
            if "error" in answer:
                return CallOutcome("raised", 0.0, f"raised {answer['error']}", answer["traceback"])
            limit = self._settings.memory_bytes
            outcome = CallOutcome(
                "out_of_memory", detail=f"ran out of memory (memory_bytes={limit})"
            )
        self.close()
        return outcome

    def kill(self) -> None:
        """End the process and its children at once; a call in another thread ends with them."""
        if self._is_killed:
            return  # the process id may belong to another process by now
        self._is_killed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a dead group
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and reap it. Call this in the thread that made it."""
        self.kill()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_S)

    def forget(self) -> None:
        """In a forked child: drop the parent's process without waiting for it or killing it."""
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
