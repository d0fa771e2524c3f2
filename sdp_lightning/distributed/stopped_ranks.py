"""Finds ranks of this machine that are stopped (SIGSTOP), and ends them.

A stopped rank keeps its connections and hears nothing: no deadline of its own ends it. If the rank
that would find it is gone, too, the kernel lets it go on, and it finds that by itself.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

LOOK_S = 1.0  # between two looks
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2


def go_on_without_parent() -> None:
    """Let the kernel continue this process, if it is stopped, when the one that started it ends.

    A signal for that moment that somebody else has asked for is left. If the parent has ended
    before, so have the connections to it, which a process that is not stopped hears at once. Does
    nothing but on Linux.
    """
    if sys.platform != "linux":
        return
    libc, present = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(present))
    if present.value == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


class StoppedRanks:
    """Watches the processes at the other ends of ``links``, as far as they are Unix sockets.

    Args:
        links: connections to other ranks.
        limit_s: longest time in seconds that a rank may be stopped. Looks are counted, not time, so
            a machine or a job that is suspended as a whole ends nothing.
    """

    def __init__(self, links: Mapping[int, socket.socket], limit_s: float) -> None:
        self._ranks = {rank: (pid, link) for rank, link in links.items() if (pid := _peer(link))}
        self._limit_s, self._most = limit_s, math.ceil(limit_s / LOOK_S)
        self._looks = dict.fromkeys(self._ranks, 0)

    @property
    def can_look(self) -> bool:
        """Whether a rank can be watched here."""
        return bool(self._ranks)

    def look(self) -> tuple[int, str] | None:
        """A rank that was stopped at all looks of the last ``limit_s``, and what to say of it."""
        for rank in self._looks:
            self._looks[rank] = self._looks[rank] + 1 if self._is_stopped(rank) else 0
            if self._looks[rank] > self._most:
                return rank, f"it has been stopped (SIGSTOP) for {self._limit_s:.0f} s."
        return None

    def kill(self) -> list[str]:
        """Kill the ranks that are stopped now; a sentence about each."""
        said: list[str] = []
        for rank, (pid, _) in self._ranks.items():
            if self._is_stopped(rank):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                said.append(f"rank {rank} was stopped (SIGSTOP), and is killed: process {pid}.")
        return said

    def _is_stopped(self, rank: int) -> bool:
        pid, link = self._ranks[rank]
        try:
            poll = select.poll()
            poll.register(link, 0)
            if poll.poll(0):  # hung up: it has ended, and its number may be another's
                return False
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):  # it has ended; the link is closed
            return False
        return state == "T"


def _peer(link: socket.socket) -> int | None:
    """Number of the process at the other end; None if it cannot be known."""
    if sys.platform != "linux" or link.family != socket.AF_UNIX:
        return None
    size = struct.calcsize("3i")  # process, user, group
    pid, _, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid if pid not in (0, os.getpid()) else None
