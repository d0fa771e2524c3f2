"""How a wait for rollouts is ended from outside: SIGTERM, Ctrl-C, max_time."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.errors import ConfigError, RankError, RolloutTimeout
from sdp_lightning.lightning.put_off_saves import PutOffSaves
from sdp_lightning.rollout.executor import WorkflowExecutor


class StopRequest:
    """Whether a signal asked the run to stop. Waits poll it, which is also their sign of life.

    Attributes:
        signum: number of the signal; None before any.
        agreed: whether all ranks know of it, each between two steps, and stop now.
        looked_at: time of the last poll, by ``time.monotonic``.
        saves: checkpoints that wait for the end of the step.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.agreed = False
        self.looked_at = 0.0
        self.saves = PutOffSaves()

    def look(self) -> bool:
        """Whether to stop."""
        self.looked_at = time.monotonic()
        return self.signum is not None

    def obey(self, signums: Iterable[int | None]) -> None:
        """Raise ``KeyboardInterrupt`` or ``SIGTERMException`` if a rank got a signal."""
        for signum in signums:
            if signum is not None:
                self.agreed = True
                raise_as_lightning(signum)


def raise_as_lightning(signum: int) -> None:
    """Raise Lightning's exception for Ctrl-C or SIGTERM."""
    raise KeyboardInterrupt if signum == signal.SIGINT else SIGTERMException()


def require_published(executor: WorkflowExecutor) -> None:
    """Raise ``ConfigError`` if no weights were published to the engine."""
    if not executor.is_published:
        raise ConfigError(
            "no weights were published to the engine, so it cannot sample: add "
            "WeightSyncCallback() to the Trainer's callbacks."
        )


@contextmanager
def ends_on_sigterm(trainer: L.Trainer) -> Generator[None]:
    """Turn the error of a wait that SIGTERM cut short into Lightning's exception."""
    try:
        yield
    except (RolloutTimeout, RankError) as error:
        if trainer.received_sigterm:
            raise SIGTERMException() from error
        raise


def is_time_up(trainer: L.Trainer) -> bool:
    """Whether ``max_time`` is over. Lightning itself checks it only after a step."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)
