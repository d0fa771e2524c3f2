"""Rewards of completions: pure functions of a completion and its dataset row.

``RewardPool`` calls them in worker processes that can be killed. ``reasoning_gym`` and
``mathematics`` need a library each, and are imported by their own names only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdp_lightning.rewards.foreign_code import workers_only
from sdp_lightning.rewards.text import exact_match, find_numbers, numeric_match

if TYPE_CHECKING:
    from sdp_lightning.rewards.pool import RewardCounts, RewardPool, RewardRejected
    from sdp_lightning.rewards.worker_limits import WorkerLimits

__all__ = [
    "RewardCounts",
    "RewardPool",
    "RewardRejected",
    "WorkerLimits",
    "exact_match",
    "find_numbers",
    "numeric_match",
    "workers_only",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdp_lightning.rewards import pool  # asyncio and subprocess: not for the workers

    return getattr(pool, name)
