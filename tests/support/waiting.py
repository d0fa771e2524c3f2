"""Waits for an event, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
DEADLINE_S = 200.0


def wait_for(look: Callable[[], T], describe: Callable[[], object] = lambda: "nothing came") -> T:
    """The first true value of ``look()``; at the deadline fails with what ``describe()`` says."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := look()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:g} s: {describe()}"
        time.sleep(0.005)
    return value
