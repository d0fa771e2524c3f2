"""Rewards with names, and the one number that they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sdp_lightning.errors import RolloutError


def weighted_sum(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of each reward times its weight.

    Args:
        rewards: finite rewards by name.
        weights: finite weights by the same names.

    Raises:
        RolloutError: if the names differ, or a number is not finite; names them.
    """
    if rewards.keys() != weights.keys():
        raise RolloutError(f"the rewards are {sorted(rewards)}, but weights {sorted(weights)}.")
    for name, reward in rewards.items():
        if not math.isfinite(reward) or not math.isfinite(weights[name]):
            raise RolloutError(
                f"reward {name!r} is {reward}, its weight {weights[name]}; both must be finite."
            )
    return math.fsum(weights[name] * reward for name, reward in rewards.items())


def check_sum(reward: float, rewards: Mapping[str, float], weights: Mapping[str, float]) -> None:
    """Raise ``RolloutError`` if ``reward`` is not the weighted sum of ``rewards``."""
    total = weighted_sum(rewards, weights)
    if not math.isclose(reward, total, rel_tol=1e-6, abs_tol=1e-6):
        raise RolloutError(
            f"the reward {reward} of a Trajectory is not the weighted sum {total} of its rewards "
            f"{dict(rewards)}. Change a named reward, or add one, instead of the sum."
        )
