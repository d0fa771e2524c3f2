"""Calls of reward pools, and the processes that they leave."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

from sdp_lightning.rewards import RewardPool
from support import misbehaving_rewards

DEADLINE_S = 60.0
FILE = misbehaving_rewards.__file__
PLACE = f"{FILE}:reward"
QUARTER_GIB = 2**28
ROW = {"id": "r7"}


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), DEADLINE_S))  # type: ignore[arg-type]


def call(pool: RewardPool, completion: str, **row: Any) -> Any:
    return run(lambda: pool(completion, ROW | row))


def is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True).stdout
    return bool(state.strip()) and not state.startswith(b"Z")  # nobody may wait for an orphan


def parent_of(process: int) -> int:
    return int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(process)]))


def group_of(process: int) -> list[int]:
    """The processes that run in the process group of ``process``."""
    children = subprocess.run(["pgrep", "-g", str(process)], capture_output=True, text=True)
    return [number for number in map(int, children.stdout.split()) if is_running(number)]
