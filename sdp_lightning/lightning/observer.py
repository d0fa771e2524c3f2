"""Observers: callbacks that show a run, and can neither end it nor hide why it ended.

An observer that raises is named in one warning and set aside: the run goes on without it.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from sdp_lightning.config.storable_text import storable
from sdp_lightning.errors import HangError, SDPError, message_of, user_place

logger = logging.getLogger(__name__)

# Hooks before the first step, in which an observer may still refuse a run by an SDPError.
STARTS = frozenset({"setup", "on_fit_start", "on_train_start", "on_predict_start"})
_OTHERS = ("setup", "teardown", "state_dict", "load_state_dict")
ROLLOUT_HOOK = "on_rollouts"  # of this package; Lightning has no such hook
HOOKS = frozenset(n for n in vars(Callback) if n.startswith("on_") or n in _OTHERS)


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an :class:`Observer` whose errors set it aside, and that then does nothing.

    Its state is then empty.

    ``Exception`` only: a signal, or the Watchdog, that ends the run meanwhile passes through.
    """

    @functools.wraps(method)
    def call(self: Observer, *args: Any, **kwargs: Any) -> Any:
        name = method.__name__
        nothing: Any = {} if name == "state_dict" else None
        if self.is_set_aside and name != "setup":
            return nothing
        try:
            return method(self, *args, **kwargs)
        except HangError:
            raise
        except Exception as error:
            if name in STARTS and isinstance(error, SDPError):
                raise
            self.set_aside(error)
            return nothing

    return call


class Observer(Callback, ABC):
    """A callback that shows or keeps what a run does.

    Every hook that a subclass defines is :func:`guarded`, so an observer needs no ``try`` of its
    own. Before the first step an ``SDPError`` still refuses the run.

    Attributes:
        lost: what the run lacks without this observer, for the warning.
    """

    lost: ClassVar[str]
    is_set_aside = False

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for name in (HOOKS | {ROLLOUT_HOOK}) & vars(cls).keys():
            setattr(cls, name, guarded(vars(cls)[name]))

    @abstractmethod
    def let_go(self) -> None:
        """Give up threads and files: the observer is set aside until the next run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Observe again: a new run begins."""
        super().setup(trainer, pl_module, stage)
        self.is_set_aside = False

    def set_aside(self, error: Exception) -> None:
        """Say once that the observer failed, and take no more part in the run."""
        if self.is_set_aside:
            return
        self.is_set_aside = True
        say_set_aside(type(self).__name__, error, self.lost)
        try:
            self.let_go()
        except Exception as another:
            say_set_aside(f"{type(self).__name__}.let_go()", another, "what it still holds")


def say_set_aside(name: str, error: Exception, lost: str) -> None:
    """Warn that an observer failed, where in its code, and with what is lost by that."""
    place = user_place(error)
    text = describe(error) + ("" if place is None else f" (from {place})")
    logger.warning("%s failed and is set aside: %s. Lost: %s.", name, text, lost)


def describe(error: BaseException) -> str:
    """Kind and message of an error, as text that every log can hold."""
    return storable(f"{type(error).__name__}: {message_of(error)}")
