"""What counts as a reward: one finite number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
        raise RolloutError(
            f"reward {name!r} returned {_shown(value)}; it must be a number."
        ) from error
    if reward != reward or reward in (float("inf"), float("-inf")):
        raise RolloutError(f"reward {name!r} returned {reward}; it must be finite.")
    return reward


def as_rewards(value: object, name: str, count: int) -> list[float]:
    """``value``, of a reward that scores a whole group, as ``count`` floats.

    Raises:
        RolloutError: if it is not so many finite numbers.
    """
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise RolloutError(
            f"reward {name!r} returned {_shown(value)}; of {count} completions it must be {count} "
            "numbers."
        )
    values: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType]
    if len(values) != count:
        raise RolloutError(
            f"reward {name!r} returned {len(values)} numbers for {count} completions."
        )
    return [as_reward(each, name) for each in values]


def _shown(value: object) -> str:
    try:
        return repr(value)[:_LONGEST]
    except ValueError:  # an integer of more digits than Python writes
        return f"a value of {type(value)} that cannot be written out"
