"""Rewards that go wrong in every way; the completion says in which.

Imported by worker processes, so it imports next to nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdp_lightning.errors import InfrastructureError
from sdp_lightning.rewards import worker_reward
from sdp_lightning.rewards.foreign_code import score_or_zero, workers_only
from sdp_lightning.rewards.worker_channel import receive, send


def reward(completion: str, row: Mapping[str, Any]) -> Any:
    return WAYS[completion](row)


async def async_reward(completion: str, row: Mapping[str, Any]) -> float:
    await asyncio.sleep(0)
    return float(len(completion))


def execute(completion: str, row: Mapping[str, Any]) -> float:
    """As a reward for code does that runs it in its own process."""
    with contextlib.suppress(Exception):
        exec(completion, {"sys": sys, "worker": worker_reward, "name": __name__, "row": row})
    return float(row["n"])


@workers_only
def evaluating(completion: str, row: Mapping[str, Any]) -> float:
    """Right if it is 3, and a verifier's error if it is no number."""
    return score_or_zero(lambda: int(completion) == 3, lambda: True, name="int()")


NUM_CALLS = [0]


def count(completion: str, row: Mapping[str, Any]) -> float:
    NUM_CALLS[0] += 1
    return float(NUM_CALLS[0])


def by_row(completion: str, row: Mapping[str, Any]) -> Any:
    return WAYS[row["way"]](row)


def process_id(row: Any) -> float:
    return float(os.getpid())


def has_torch(row: Any) -> float:
    return float(any(name in sys.modules for name in ("torch", "numpy", "lightning")))


def loop(row: Any) -> float:
    while True:
        pass


def sleep_with_the_gil(row: Any) -> float:
    return float(ctypes.PyDLL(None).sleep(3600))


def power_tower(row: Any) -> float:
    nine = len("123456789")
    return float(nine**nine**nine**nine)


def stop(row: Any) -> float:
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0.0


def read_null(row: Any) -> float:
    return float(len(ctypes.string_at(0)))


def leave(row: Any) -> float:
    os._exit(3)


def close_all_files(row: Any) -> float:
    os.closerange(3, 1000)
    time.sleep(3600)
    return 0.0


def write_into_all_files(row: Any) -> float:
    for number in range(3, 4096):
        with contextlib.suppress(OSError):
            os.write(number, b"\0" * 7 + b"\3abc")
    return 0.0


def one_big_piece(row: Any) -> float:
    return float(len(bytearray(10 * 2**30)))


def many_small_pieces(row: Any) -> float:
    pieces: list[bytearray] = []
    while True:
        pieces.append(bytearray(2**20))


def unpicklable(row: Any) -> Any:
    return lambda: 0.0


def unspeakable(row: Any) -> Any:
    class Unspeakable:
        def __repr__(self) -> str:
            return "x" * 10**7

    return Unspeakable()


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def fail(error: Exception) -> float:
    raise error


def recurse(row: Any) -> float:
    return recurse(row)


def divide(row: Any) -> float:
    return 1 / 0


def interrupt(row: Any) -> float:
    raise KeyboardInterrupt("by itself")


def noise(row: Any) -> float:
    print("noise " * 10)
    os.write(1, b"more noise\n")
    return 1.0


def alarm(row: Any) -> float:
    """As math-verify does: only the main thread may set a handler."""
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(10)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return 1.0


def fork_and_both_return(row: Any) -> float:
    os.fork()
    return 1.0


def fork_and_leave_a_loop(row: Any) -> float:
    if os.fork() == 0:
        time.sleep(3600)
    return float(os.getpid())


def leave_with_a_child_behind(row: Any) -> float:
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(3)


def hang_with_a_child_of_c(row: Any) -> float:
    """Python does not know of that child: it holds what its parent held."""
    if ctypes.CDLL(None).fork() == 0:
        os.setsid()
        Path(row["file"] + ".child").write_text(str(os.getpid()))
        time.sleep(3600)
        os._exit(0)
    return hang_and_say_so(row)


def thread(row: Any) -> float:
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return float(os.getpid())


def hang_with_a_child(row: Any) -> float:
    child = subprocess.Popen(["sleep", "3600"])
    Path(row["file"]).write_text(str(child.pid))
    return loop(row)


def hang_and_say_so(row: Any) -> float:
    Path(row["file"]).write_text(str(os.getpid()))
    return sleep_with_the_gil(row)


def meet(row: Any) -> float:
    """Returns when the calls of ``row["num"]`` workers are here."""
    folder = Path(row["folder"])
    (folder / str(os.getppid())).touch()
    while len(list(folder.iterdir())) < row["num"]:
        time.sleep(0.005)
    return 1.0


def big_row(row: Any) -> float:
    return float(len(row["text"]))


def daemon(row: Any) -> float:
    """Leaves ``row["num"]`` processes in sessions of their own, whose parents have ended."""
    for index in range(row["num"]):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                (Path(row["folder"]) / str(os.getpid())).touch()
                time.sleep(3600)
            os._exit(0)
        os.wait()
        while len(list(Path(row["folder"]).iterdir())) <= index:
            time.sleep(0.005)
    return ENDS[row.get("end", "return")](row)


def bomb(row: Any) -> float:
    """Doubles its processes, up to 256, as fast as it can; none of them ends."""
    Path(row["file"]).write_text(str(os.getpid()))
    for _ in range(8):
        os.fork()
    time.sleep(3600)
    return 1.0


def daemon_and_hang(row: Any) -> float:
    return daemon({**row, "end": "hang"})


def parent_id(row: Any) -> float:
    return float(os.getppid())


def num_sockets(row: Any) -> float:
    links = [os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.exists()]
    return float(sum(link.startswith("socket:") for link in links))


def files_of_a_child(row: Any) -> float:
    """The largest file descriptor of a program that inherits all it can."""
    text = "import os; print(max(n for n in map(int, os.listdir('/proc/self/fd')) if n != 3))"
    child = subprocess.run(
        [sys.executable, "-c", text], close_fds=False, stdout=subprocess.PIPE, check=True
    )
    return float(child.stdout)


def forge(row: Any) -> float:
    """Writes an answer into every file, as code of a completion may, then goes on."""
    body = row["body"].encode()
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, row.get("tag", b"") + struct.pack("!Q", len(body)) + body)
    return float(row["honest"])


def find_nonce(row: Any) -> tuple[Any, bytes]:
    """The connection and the nonce of this call, from the frames of the worker's own code."""
    frame = sys._getframe()
    while "nonce" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["connection"], frame.f_locals["nonce"]


def forge_with_the_nonce(row: Any) -> float:
    connection, nonce = find_nonce(row)
    send(connection, nonce, row["body"].encode())
    return float(row["honest"])


def take_over(row: Any) -> float:
    """Answers as the worker's own code does, and never comes back."""
    connection, nonce = find_nonce(row)
    send(connection, nonce, row["body"].encode())
    send(connection, receive(connection)[0], b"")
    return loop(row)


def forge_later(row: Any) -> float:
    """Writes after the answer, when the file ``go`` is there."""
    connection, _ = find_nonce(row)
    number = os.dup(connection.fileno())

    def write() -> None:
        while not Path(row["go"]).exists():
            time.sleep(0.005)
        os.write(number, b"late")
        Path(row["done"]).touch()

    threading.Thread(target=write, daemon=True).start()
    return 1.0


ENDS: dict[str, Callable[[Any], float]] = {
    "return": lambda row: 1.0,
    "leave": leave,
    "loop": loop,
    "hang": hang_and_say_so,
    "kill the group": lambda row: float(os.killpg(0, signal.SIGKILL) or 0),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in list(globals().values())
    if callable(function) and getattr(function, "__module__", None) == __name__
}
WAYS |= {"abort": lambda row: os.abort(), "sys.exit": lambda row: sys.exit(3)}
WAYS |= {  # plain ones, by what they do
    "close stdout": lambda row: [os.close(1), 1.0][1],
    "close the streams": lambda row: [sys.stdout.close(), sys.stderr.close(), 1.0][2],
    "exit with 0": lambda row: os._exit(0),
    "be killed": lambda row: os.kill(os.getpid(), signal.SIGKILL),
    "kill the group": lambda row: os.killpg(0, signal.SIGKILL),
    "an alarm": lambda row: [signal.alarm(1), time.sleep(60)],
    "ignore SIGTERM": lambda row: [signal.signal(signal.SIGTERM, signal.SIG_IGN), loop(row)],
    "a huge integer": lambda row: 10**5000,
    "a huge error": lambda row: fail(ValueError("x" * 10**8)),
    "a deep recursion": recurse,
    "an error that cannot be shown": lambda row: fail(Unshowable()),
}
WAYS |= {"ask a judge": lambda row: fail(InfrastructureError("the judge timed out"))}
WAYS |= {"good": lambda row: 1.0, "bad": lambda row: 0.0}
