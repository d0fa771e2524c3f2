"""The processes below a process, from ``/proc``; none are found where there is none (macOS)."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PROC = Path("/proc")


def descendants(root: int, at_most: int | None = None) -> list[int]:
    """Process ids of all processes below ``root``, parents first, with those nobody waited for.

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


def kill(process: int) -> None:
    """Kill a process and its process group."""
    for kill_it in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill_it(process, signal.SIGKILL)


def stop(process: int) -> None:
    """Stop a process, which then forks no more."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGSTOP)


def _children(process: int) -> list[int]:
    numbers: list[int] = []
    with contextlib.suppress(OSError):  # it, or a thread of it, has ended meanwhile
        for thread in os.listdir(f"{_PROC}/{process}/task"):
            with open(f"{_PROC}/{process}/task/{thread}/children") as file:
                numbers += map(int, file.read().split())
    return numbers


def _children_of_all() -> dict[int, list[int]]:
    """The children of every process, by its id: for kernels without ``children`` files."""
    children: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    return children
