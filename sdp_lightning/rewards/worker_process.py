"""A worker process seen from the trainer: start it, call it with a deadline, kill it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sdp_lightning.errors import RolloutError
from sdp_lightning.rewards import worker_channel, worker_main
from sdp_lightning.rewards.sandbox import Sandbox, in_sandbox
from sdp_lightning.rewards.value import Score, why_no_name
from sdp_lightning.rewards.worker_limits import WorkerLimits

OutcomeKind = Literal["value", "raised", "infrastructure", "timed_out", "out_of_memory", "crashed"]
ANSWERS: tuple[OutcomeKind, ...] = ("value", "raised", "infrastructure")  # no process is lost

_KILL_S = 5.0  # a worker that is told to end has killed all that is its own by then
_EXIT_S = 1.0  # from the end of the connection to the exit status
_KILLED = ("died of SIGKILL", "ended its process with exit status 137", "ended its process")
_ROOT = str(Path(worker_main.__file__).parents[2])
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from sdp_lightning.rewards.worker_main import "
    "main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class CallOutcome:
    """How one call ended: with a value, with an error of the reward, or by killing its process.

    Attributes:
        detail: what happened, as the end of a sentence about the reward; of a value, a verifier
            that raised on the completion, or empty; of an infrastructure error, its cause.
        traceback: traceback of the reward's own error; empty for other outcomes.
        values: values of a reward that scores a group.

    A value is a number, or numbers by name.
    """

    kind: OutcomeKind
    value: Score = 0.0
    detail: str = ""
    traceback: str = ""
    values: tuple[Score, ...] = ()


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker process.

    Attributes:
        spec: import path of the reward, for ``load_object``.
        name: name of the reward in messages.
        limits: what the process and its children may take.
        start_s: longest start in seconds, with loading the reward.
        sandbox: tool that the process runs under; None runs it as any other.
        fork_calls: whether each call runs in a process of its own.
    """

    spec: str
    name: str
    limits: WorkerLimits
    start_s: float
    sandbox: Sandbox | None = None
    fork_calls: bool = True

    def command(self, descriptor: int) -> list[str]:
        """Command line of a worker that serves the socket ``descriptor`` of this process."""
        python = [sys.executable, "-P", "-c", _START, _ROOT, str(descriptor)]
        if self.sandbox is None:
            return [*python, str(os.getpid())]
        file = self.spec.rpartition(":")[0]
        files = [_ROOT, *([file, os.path.dirname(file)] if file.endswith(".py") else [])]
        return in_sandbox(self.sandbox, [*python, "0"], files=files, descriptor=descriptor)


class KilledWhileLoadingError(RolloutError):
    """A worker died of SIGKILL before it had loaded the reward: of the OOM killer, or by hand."""


class LostBetweenCallsError(Exception):
    """The worker ended before it began with the call, which may be made in another one."""


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
            self._process = subprocess.Popen(
                settings.command(worker_end.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=2,  # prints of a reward stay out of the trainer's stdout
                pass_fds=[worker_end.fileno()],
                process_group=0,  # Ctrl-C is for the trainer
            )
        self._is_killed = self._forks = False
        self._num_calls = 0

    def load(self) -> list[str]:
        """Load the reward.

        Returns:
            What this system cannot enforce, in sentences.

        Raises:
            RolloutError: if it takes too long, raises, or ends the process.
            KilledWhileLoadingError: if the process is killed meanwhile.
        """
        settings = self._settings
        setup = asdict(settings) | {"path": [str(path) for path in sys.path]}
        notes = settings.limits.unenforced()
        try:
            outcome = self._exchange(json.dumps(setup).encode(), settings.start_s, notes)
        except LostBetweenCallsError:
            outcome = CallOutcome("crashed", detail="ended its process")
        if outcome.kind != "value":
            is_killed = outcome.detail in _KILLED
            self.close()
            raise (KilledWhileLoadingError if is_killed else RolloutError)(
                f"reward {settings.spec!r} {outcome.detail} while a worker process loaded it "
                f"(start_s={settings.start_s}, limits.memory_mb={settings.limits.memory_mb}).\n"
                f"{outcome.traceback}".rstrip()
            )
        self._forks = outcome.value == 1.0
        if settings.fork_calls and not self._forks:
            notes.append(
                "it starts threads or CUDA while it is loaded, and cannot be forked for each call: "
                "what a call changes in its process, later calls see (fork_calls=False says that "
                "this is meant)."
            )
        return notes

    @property
    def is_alive(self) -> bool:
        """Whether the process can be called."""
        return not self._is_killed and self._process.poll() is None

    @property
    def has_ended_itself(self) -> bool:
        """Whether the process ended without being killed: between two calls."""
        return not self._is_killed and self._process.poll() is not None

    def call(self, arguments: bytes, timeout_s: float) -> CallOutcome:
        """Send ``arguments`` and wait for the answer. Without one in time the worker is killed.

        Raises:
            LostBetweenCallsError: if the process ended before this call.
        """
        return self._exchange(arguments, timeout_s, None)

    def _exchange(self, data: bytes, timeout_s: float, notes: list[str] | None) -> CallOutcome:
        wait = worker_channel.until(self._connection, time.monotonic() + timeout_s)
        self._num_calls += 1
        tag = worker_channel.number_tag(self._num_calls)
        is_sent = goes_on = False
        try:
            if notes is not None:
                notes += json.loads(worker_channel.receive(self._connection, wait=wait)[1])
            worker_channel.send(self._connection, tag, data, wait)
            is_sent = True
            _, answer = worker_channel.receive(self._connection, tag, wait=wait)
            outcome = self._outcome_of(answer)
            ran_out = outcome.kind == "out_of_memory" and self._forks
            goes_on = ran_out or not answer.startswith(
                (worker_channel.ANSWERED, worker_channel.ENDED)
            )
        except TimeoutError:
            outcome = CallOutcome("timed_out", detail=f"took longer than {timeout_s} s")
            goes_on = self._forks and is_sent and self._give_up()
        except (EOFError, OSError):
            outcome = CallOutcome("crashed", detail=self._how_it_ended())
        except (ValueError, RecursionError):
            outcome = CallOutcome("crashed", detail=worker_channel.WROTE)
            goes_on = self._forks
        except worker_channel.ForgedError:
            outcome = CallOutcome("crashed", detail=worker_channel.WROTE)
        if outcome.kind not in ANSWERS and not goes_on:
            self.close()
        return outcome

    def _give_up(self) -> bool:
        """Have the keeper end the call; whether the worker can take the next one."""
        wait = worker_channel.until(self._connection, time.monotonic() + _KILL_S)
        try:
            worker_channel.send(self._connection, worker_channel.GIVE_UP, b"", wait)
            while True:
                tag, answer = worker_channel.receive(self._connection, wait=wait)
                if tag == worker_channel.GIVE_UP:
                    return answer == worker_channel.GOES_ON
        except (EOFError, OSError):  # with TimeoutError
            return False

    def _outcome_of(self, data: bytes) -> CallOutcome:
        """The outcome that an answer tells. ``ValueError`` or ``RecursionError`` if it is none."""
        kind, body = data[:1], data[1:]
        if kind in (worker_channel.ENDED, worker_channel.GOES_ON):
            return CallOutcome("crashed", detail=body.decode())
        match json.loads(body):
            case {"value": float() | {} as value, **rest} if _is_score(value):
                return CallOutcome("value", value, str(rest.get("note", "")))
            case {"value": [*values]} if all(map(_is_score, values)):
                return CallOutcome("value", values=tuple(values))
            case {"infrastructure": str(cause)}:
                return CallOutcome("infrastructure", detail=cause)
            case {"error": str(error), "traceback": str(traceback)}:
                return CallOutcome("raised", 0.0, f"raised {error}", traceback)
            case {"out_of_memory": True}:
                limit = self._settings.limits.memory_mb
                detail = f"ran out of memory (limits.memory_mb={limit})"
                return CallOutcome("out_of_memory", detail=detail)
            case answer:
                raise ValueError(f"no answer: {str(answer)[:100]}")

    def kill(self) -> None:
        """End the process and its children at once; a call in another thread ends with them."""
        if self._is_killed:
            return
        self._is_killed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # it kills all that is its own, and ends

    def close(self) -> None:
        """Kill the process and reap it. Call this in the thread that made it."""
        self.kill()
        self._connection.close()
        try:
            self._process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a dead group
                os.killpg(self._process.pid, signal.SIGKILL)
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
        if status == worker_main.LOST_BETWEEN_CALLS:
            self.close()
            raise LostBetweenCallsError
        if status >= 0:
            return f"ended its process with exit status {status}"
        return f"died of {signal.Signals(-status).name}"


def _is_score(value: object) -> bool:
    """Whether ``value``, read from JSON, is a finite number, or such numbers by name."""
    if isinstance(value, dict):
        named: dict[str, object] = value
        return bool(named) and not any(
            why_no_name(name) or not (type(each) is float and math.isfinite(each))
            for name, each in named.items()
        )
    return type(value) is float and math.isfinite(value)
