"""What a reward asks for by the names of its parameters, beside the completion and the row."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

from sdp_lightning.errors import ConfigError

NAMES = ("prompt", "messages", "token_ids", "finish_reason", "group_index")
GROUP = "completions"


@dataclass(frozen=True)
class Asked:
    """The parameters of a reward.

    Attributes:
        names: those of ``NAMES`` that it is given by name.
        is_group: whether it scores the samples of a group at once: its first parameter is named
            ``completions``. Its rewards, and what it asks for but the prompt, are lists.
    """

    names: tuple[str, ...] = ()
    is_group: bool = False


def asked_by(reward: object) -> Asked:
    """What ``reward`` asks for: the first two parameters are completion and row, by position.

    A parameter that a ``functools.partial`` has set is left to it. Of a callable that Python cannot
    look into, it is nothing more.

    Raises:
        ConfigError: if it cannot be called so: it needs another parameter, or takes columns of the
            data set as keywords, as TRL's rewards do.
    """
    if not callable(reward):
        return Asked()
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):
        return Asked()
    is_set = set(reward.keywords) if isinstance(reward, functools.partial) else set[str]()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    more = [p for p in named if p not in positional[:2] and p.name not in is_set]
    for parameter in more:
        if parameter.name not in NAMES and parameter.default is parameter.empty:
            # foreign: a callable may have no name
            name = str(getattr(reward, "__name__", reward))
            raise ConfigError(
                f"reward {name!r} needs {parameter.name!r}, which no reward is given. Its first "
                f"two parameters are the completion (or {GROUP!r}, the whole group) and the row; "
                f"others may be {', '.join(NAMES)}. Set one of its own with functools.partial."
            )
    is_group = bool(positional) and positional[0].name == GROUP
    takes_columns = is_group and any(p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_columns and [p.name for p in positional[1:2]] != ["row"]:
        # foreign: a callable may have no name
        name = str(getattr(reward, "__name__", reward))
        raise ConfigError(
            f"reward {name!r} has a form for TRL, {name}{inspect.signature(reward)}, and would be "
            f"given the row in place of a column. Write def {name}({GROUP}, row), and take "
            '[row["column"]] * len(completions) for a column.'
        )
    return Asked(tuple(p.name for p in more if p.name in NAMES), is_group)
