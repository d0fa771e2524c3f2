"""Runs a command, and ends all its processes when standard input closes.

``python process_guard.py GRACE_S COMMAND...``, with the standard library alone. The starter holds
the other end of standard input, so it also closes when the starter is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def main(command: list[str], grace_s: float) -> int:
    """Run ``command`` in its own process group; returns its exit status when all have ended.

    Args:
        command: the program and its arguments.
        grace_s: seconds between SIGTERM and SIGKILL.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the starter, or its death, ends this
    starter = os.getppid()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=_prepare, process_group=0
    )
    while child.poll() is None and not _is_over(starter):
        pass
    _end_group(child, grace_s)
    status = child.wait()
    return status if status >= 0 else 128 - status  # as a shell reports signals


def _is_over(starter: int) -> bool:
    """Whether the starter has closed standard input or died; waits up to ``_POLL_S``."""
    ready, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    # A process that the starter has forked may hold the other end open.
    return (bool(ready) and not os.read(sys.stdin.fileno(), 4096)) or os.getppid() != starter


def _end_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send SIGTERM to the child's process group, and SIGKILL after the grace."""
    deadline = time.monotonic() + grace_s
    try:
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()  # reap it: a zombie would count as a process of the group
            os.killpg(child.pid, 0)
            time.sleep(_POLL_S / 2)
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended


def _prepare() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":  # in case this process is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], float(sys.argv[1])))
