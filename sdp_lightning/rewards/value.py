"""What counts as a reward: one finite number, or several by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdp_lightning.errors import RolloutError

Score = float | dict[str, float]  # a reward, or several by name

_LONGEST = 500  # characters of a wrong value that are shown
_LONGEST_NAME = 80  # characters


class LostZero(float):
    """The 0 of a call that was lost; of a reward that returns several, 0 for each of them."""


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


def as_score(value: object, name: str) -> Score:
    """``value`` as a float, or as floats by name if it is a mapping.

    Raises:
        RolloutError: if it is neither a finite number nor a mapping of names to such.
    """
    if not isinstance(value, Mapping):
        return as_reward(value, name)
    named: Mapping[object, object] = value
    if not named:
        raise RolloutError(f"reward {name!r} returned no rewards: {{}}.")
    return {_name(key, name): as_reward(each, f"{name}/{key}") for key, each in named.items()}


def as_scores(value: object, name: str, count: int) -> list[Score]:
    """``value``, of a reward that scores a whole group, as ``count`` scores.

    Several rewards come as a mapping for each completion, or as a list for each name.

    Raises:
        RolloutError: if it is not so many finite numbers, or mappings of names to such.
    """
    if isinstance(value, Mapping):
        named: Mapping[object, object] = value
        columns = {key: _listed(each, f"{name}/{key}", count) for key, each in named.items()}
        return [
            as_score({k: column[i] for k, column in columns.items()}, name) for i in range(count)
        ]
    return [as_score(each, name) for each in _listed(value, name, count)]


def why_no_name(name: object) -> str:
    """Why ``name`` cannot name a reward, as the end of a sentence; empty if it can."""
    if not isinstance(name, str):
        return "it must be a text"
    if not 0 < len(name) <= _LONGEST_NAME or name != name.strip() or not name.isprintable():
        return f"it must have 1 to {_LONGEST_NAME} printable characters, without spaces around them"
    return ""


def _name(key: object, reward: str) -> str:
    if why := why_no_name(key):
        raise RolloutError(f"reward {reward!r} returned a reward named {_shown(key)}; {why}.")
    return str(key)


def _listed(value: object, name: str, count: int) -> list[object]:
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
    return values


def _shown(value: object) -> str:
    try:
        return repr(value)[:_LONGEST]
    except ValueError:  # an integer of more digits than Python writes
        return f"a value of {type(value)} that cannot be written out"
