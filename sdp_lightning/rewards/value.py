"""What counts as a reward: one finite number."""

from __future__ import annotations

from sdp_lightning.errors import RolloutError

_LONGEST = 500  # characters of a wrong value that are shown


def as_reward(value: object, name: str) -> float:
    """``value`` as a float.

    Args:
        value: return value of a reward function.
        name: name of the function.

    Raises:
        RolloutError: if it is no finite number.
    """
    try:
        reward = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        shown = repr(value)[:_LONGEST]
        raise RolloutError(f"reward {name!r} returned {shown}; it must be a number.") from error
    if reward != reward or reward in (float("inf"), float("-inf")):
        raise RolloutError(f"reward {name!r} returned {reward}; it must be finite.")
    return reward
