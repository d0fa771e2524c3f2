"""Rewards that run foreign code on what the policy wrote: worker processes call them, or nobody.

A verifier of a library may evaluate a completion, import by its words, backtrack over it, or never
return. In the trainer that would be the policy's code in the trainer's process, and ``9**9**9**9``
holds the interpreter's lock through every timeout. So such a reward is declared ``workers_only``: a
workflow without worker processes refuses it when it is made, and whatever else calls it outside of
one (a wrapper, a callback, a notebook) gets a ``ConfigError`` instead of a value.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from sdp_lightning.errors import ConfigError

_MARK = "workers_only"
_VARIABLE = "SDP_REWARD_WORKER"  # inherited by the processes that a worker starts
WORKFLOW_REMEDY = "set reward_workers=2 of the workflow, or pass a RewardPool"

_notes: list[str] = []  # of this process
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def workers_only(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Declares a reward, plain or async, that only worker processes may call.

    A class whose instances are rewards says the same with ``workers_only = True`` in its body.
    """

    @functools.wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _VARIABLE not in os.environ:
            raise ConfigError(_refusal(guarded, WORKFLOW_REMEDY))
        return function(*args, **kwargs)

    setattr(guarded, _MARK, True)
    return guarded


def needs_workers(reward: object) -> bool:
    """Whether ``reward``, or a part of a ``functools.partial`` or wrapper, is ``workers_only``."""
    # foreign: a user's callable
    if getattr(reward, _MARK, False) is True:
        return True
    if isinstance(reward, functools.partial):
        partial: functools.partial[Any] = reward
        return any(map(needs_workers, (partial.func, *partial.args, *partial.keywords.values())))
    if isinstance(reward, list | tuple):
        parts: list[object] | tuple[object, ...] = reward
        return any(needs_workers(part) for part in parts if callable(part))  # rows are none
    # foreign: a user's callable
    inner = getattr(reward, "__wrapped__", None)
    if inner is not None and inner is not reward:
        return needs_workers(inner)
    call = inspect.getattr_static(type(reward), "__call__", None)
    # foreign: a user's callable
    return getattr(call, _MARK, False) is True


def refuse_without_workers(reward: object, remedy: str = WORKFLOW_REMEDY) -> None:
    """Raise ``ConfigError`` if ``reward`` may run in worker processes only.

    Args:
        reward: a reward, or a part of a workflow, that the trainer's process would call.
        remedy: what to do instead, as the end of a sentence.
    """
    if needs_workers(reward):
        raise ConfigError(_refusal(reward, remedy))


def refuse_factory_without_workers(factory: object, remedy: str) -> None:
    """Raise ``ConfigError`` if ``factory`` will make something of what workers alone may run.

    Args:
        factory: function, class or ``functools.partial`` that makes an environment. Of a function
            (a lambda, or the ``__init__`` of a class) its code is asked, which is not run: for its
            closure, its defaults, and the globals and parts of modules that it names.
        remedy: what to do instead, as the end of a sentence.
    """
    refuse_without_workers(factory, remedy)
    for part in _named_by(factory):
        refuse_without_workers(part, remedy)


def _named_by(factory: object) -> list[object]:
    while isinstance(factory, functools.partial):
        factory = factory.func  # pyright: ignore[reportUnknownMemberType]
    if inspect.isclass(factory):
        factory = inspect.getattr_static(factory, "__init__")
    if not inspect.isfunction(factory):
        return []
    seen = inspect.getclosurevars(factory)
    if "RewardPool" in {*seen.globals, *seen.unbound}:  # which may be what it gives to one
        return []
    named = [*seen.globals.values(), *seen.nonlocals.values()]
    named += [*(factory.__defaults__ or ()), *(factory.__kwdefaults__ or {}).values()]
    modules = [module for module in named if inspect.ismodule(module)]
    parts = [inspect.getattr_static(m, name, None) for m in modules for name in seen.unbound]
    return [*named, *parts]


def enter_worker_process() -> None:
    """Allow this process, and those it starts, to call what is ``workers_only``."""
    os.environ[_VARIABLE] = "1"


def take_note() -> str:
    """What :func:`score_or_zero` has to say of the calls since it was asked last."""
    note = "; ".join(_notes)
    _notes.clear()
    return note


def score_or_zero(
    verify: Callable[[], object], verify_row: Callable[[], object], *, name: str = "a verifier"
) -> float:
    """The score of a foreign verifier, and 0.0 for a completion that makes it fail.

    A verifier that raises, exits, or returns no finite number has been given a wrong answer, unless
    it fails on the row's own answer as well: then the row is at fault, and the error goes on.

    Args:
        verify: the verifier, called with the completion's answer.
        verify_row: the same verifier, called with the row's own answer.
        name: name of the verifier, for the warning that a pool of workers gives once.

    Raises:
        MemoryError: if ``verify`` runs out of memory, which ends its process.
        BaseException: what ``verify_row`` raises.
    """
    try:
        score = float(verify())  # pyright: ignore[reportArgumentType] # checked by running it
    except MemoryError:
        raise
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: a completion raised it
        _check_row(verify_row, error)
        _notes.append(f"{name} raised {type(error).__name__}")
        return 0.0
    return score if math.isfinite(score) else 0.0


def _check_row(verify_row: Callable[[], object], error: BaseException) -> None:
    try:
        verify_row()
    except Exception as error_of_row:
        raise error_of_row from error


def _refusal(reward: object, remedy: str) -> str:
    while isinstance(reward, functools.partial):
        reward = reward.func  # pyright: ignore[reportUnknownMemberType]
    # foreign: a callable may have no name
    name = str(getattr(reward, "__name__", reward))
    return (
        f"{name!r} runs foreign code on completions, which may execute what the policy wrote or "
        f"never return, so it runs in worker processes only: {remedy}. By hand: "
        "asyncio.run(RewardPool('package.module:name')(completion, row))."
    )
