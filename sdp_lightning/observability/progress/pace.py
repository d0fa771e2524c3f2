"""Pace of a run and the time that is left of it. Seconds."""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from sdp_lightning.lightning.datamodule import RolloutDataModule

LATELY = 50  # batches whose time the pace is taken from
_ENDLESS = 10**8  # batches: Lightning or the loader knows no end


class Pace:
    """Times of the latest batches, with the number of optimizer steps at the end of each.

    The first batch waits for the first rollouts, so its time counts only while there is no other.
    """

    def __init__(self) -> None:
        self._times = deque[tuple[float, int]](maxlen=LATELY + 1)
        self._num_batches = -1  # the first time is that of the start

    def note(self, now: float, step: int) -> None:
        """Take in the time at which a batch has ended, or the run has started, and its step."""
        self._times.append((now, step))
        self._num_batches += 1
        if self._num_batches == 2:
            self._times.popleft()

    @property
    def steps_per_batch(self) -> float | None:
        """Mean optimizer steps of a batch; None before the first has ended."""
        if len(self._times) < 2:
            return None
        return (self._times[-1][1] - self._times[0][1]) / (len(self._times) - 1)

    def seconds_for(self, num_steps: float, now: float) -> float | None:
        """Time that ``num_steps`` more optimizer steps will take; None if that is not known.

        The time since the last batch counts as spent on the next one, as far as that takes.
        """
        steps_per_batch = self.steps_per_batch
        if not steps_per_batch:
            return None
        batch_s = (self._times[-1][0] - self._times[0][0]) / (len(self._times) - 1)
        spent_s = min(now - self._times[-1][0], batch_s)
        return max(0.0, num_steps / steps_per_batch * batch_s - spent_s)


def seconds_left(trainer: Trainer, pace: Pace, now: float) -> float | None:
    """Time until ``max_steps``, the last epoch or ``max_time`` ends the run; None if not known."""
    ends: list[float | None] = []
    steps_per_batch = pace.steps_per_batch
    if trainer.max_steps > 0:
        ends.append(pace.seconds_for(trainer.max_steps - trainer.global_step, now))
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    of_data = data.rollout.num_epochs if isinstance(data, RolloutDataModule) else None
    num_epochs = min((n for n in (trainer.max_epochs, of_data) if n and n > 0), default=None)
    if steps_per_batch and num_epochs is not None:
        num_batches = num_epochs * trainer.num_training_batches
        if num_batches < _ENDLESS:
            left = num_batches - trainer.fit_loop.epoch_loop.total_batch_idx - 1
            ends.append(pace.seconds_for(left * steps_per_batch, now))
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore
    ends += [timer.time_remaining() for timer in timers]
    known = [end for end in ends if end is not None]
    return max(0.0, min(known)) if known else None
