"""What surrounds a run, loggers and others' callbacks, cannot keep it from ending by its own error.

Lightning calls the callbacks' ``on_exception`` one after another, then the data module's, and stops
at the first that raises. A logger that raises ends a run that is healthy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from sdp_lightning.errors import HangError
from sdp_lightning.lightning.observer import Observer, say_set_aside

LOGGER_METHODS = (
    *("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize"),
)


def guard_callbacks(trainer: L.Trainer) -> None:
    """Guard the callbacks of ``trainer`` for the run that begins.

    One that raises in ``on_exception`` is named in a warning, and the next one is called. The guard
    stays on the callback, and the next run replaces it.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, Observer):
            own = _own(callback, "on_exception")
            callback.on_exception = _EndingGuard(own, type(callback).__name__)


def guard_loggers(trainer: L.Trainer) -> None:
    """Guard the loggers of ``trainer`` for the run that begins, before Lightning uses them.

    A logger that raises is named once, and gets no more calls in this run; one that cannot even
    make its ``experiment`` is taken from the Trainer.
    """
    for logger in list(trainer.loggers):
        failed: list[Exception] = []
        for name in LOGGER_METHODS:
            guard = _LoggerGuard(_own(logger, name), type(logger).__name__, failed)
            setattr(logger, name, guard)
        try:
            getattr(logger, "experiment", None)  # foreign: a Logger need not have one
        except Exception as error:
            say_set_aside(type(logger).__name__, error, "what it logs, in all runs of this Trainer")
            trainer.loggers = [other for other in trainer.loggers if other is not logger]


class _EndingGuard:
    """``on_exception`` of a callback, which lets only signals through, with all closed."""

    def __init__(self, own: Callable[..., None], name: str) -> None:
        self.own, self._name = own, name

    def __call__(self, trainer: L.Trainer, *args: Any) -> None:
        try:
            self.own(trainer, *args)
        except Exception as error:
            lost = "what it does when a run fails; the run's own error follows"
            say_set_aside(f"on_exception of {self._name}", error, lost)
        except BaseException:  # a second signal: Lightning calls nobody else
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.teardown(trainer.state.fn)
            raise


class _LoggerGuard:
    """A method of a logger; ``failed`` holds the first error of any of its methods."""

    def __init__(self, own: Callable[..., None], name: str, failed: list[Exception]) -> None:
        self.own, self._name, self._failed = own, name, failed

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            self.own(*args, **kwargs)
        except HangError:
            raise
        except Exception as error:
            self._failed.append(error)
            say_set_aside(self._name, error, "what it logs, from this step on")


def _own(owner: Any, name: str) -> Callable[..., None]:
    """The method ``name`` of ``owner``, without the guard of the run before."""
    present = getattr(owner, name)
    return present.own if isinstance(present, _EndingGuard | _LoggerGuard) else present
