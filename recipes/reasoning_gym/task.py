"""The reward of a task of reasoning-gym: its own verifier's score. The config makes its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdp_lightning.rewards.reasoning_gym import line_reward


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """From 0 to 1, for the first line; only in worker processes, which `reward_workers` starts."""
    return line_reward(completion, row)
