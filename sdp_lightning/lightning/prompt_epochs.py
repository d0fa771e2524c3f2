"""An epoch of the Trainer is one pass over the prompts: how many batches each of them has.

The unit is one group. A group that is dropped or rejected is made up for by the next row, so an
epoch is as many trained groups as there are rows; the prompts themselves end a run of so many
passes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.last_checkpoint import RunDataModule
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import first_rows
from sdp_lightning.types import Row

logger = logging.getLogger(__name__)

_EPOCHS_DEFAULT = 1000  # of Lightning

ENDLESS = 10**9  # batches


class PromptEpochs:
    """Counts the groups that are left of the Trainer's epoch.

    A pass whose last batch reaches into the next one shortens that one, so that passes and epochs
    stay together. An epoch that ``max_steps`` of an earlier job cut short is finished first.

    Args:
        rows: rows of a pass. If they are read one after another their number is not known, and the
            run is one epoch.
        batch_size: groups of a batch, of all ranks.

    Attributes:
        left: groups left of the present epoch; below 0 if its last batch reached into the next one.
            None: unknown, as in checkpoints of earlier versions.
    """

    def __init__(self, rows: Sequence[Any] | IterableRows, batch_size: int) -> None:
        self.left: int | None = None
        self._num_rows = None if isinstance(rows, IterableRows) else len(rows)
        self._batch_size = batch_size
        self._is_begun = False

    def take(self, count: int) -> None:
        """Count a batch of ``count`` groups."""
        if self.left is not None:
            self.left -= count

    def plan(self, trainer: L.Trainer, config: RolloutConfig) -> int | None:
        """Batches that all epochs of the run have together; None if they are not known.

        They are fewer if groups are dropped in the last pass, which no row makes up for.

        Args:
            trainer: its ``max_epochs``, ``limit_train_batches`` and ``overfit_batches`` count.
            config: its ``num_epochs`` and ``last_batch`` count.
        """
        epochs, passes = trainer.max_epochs, config.num_epochs
        epochs = None if epochs is None or epochs < 0 else epochs
        if self._num_rows is None:
            return None
        ends: list[int] = []
        if epochs is not None and is_limited(trainer):
            limit, whole = trainer.limit_train_batches, self._batches(self._num_rows)
            share = limit * whole if type(limit) is float else min(limit, whole)
            ends.append(epochs * int(share))
        elif epochs is not None:
            passes = min(epochs, epochs if passes is None else passes)
        if passes is not None:
            groups = self._num_rows * passes
            is_short = config.last_batch != "drop"
            ends.append(self._batches(groups) if is_short else groups // self._batch_size)
        is_default = (epochs, trainer.max_steps) == (_EPOCHS_DEFAULT, -1)
        if is_default and ends and trainer.state.fn == "fit" and trainer.is_global_zero:
            text = (
                "max_epochs=%d, which Lightning takes where no end is set: this run has %d steps "
                "of a batch. Set max_steps or max_epochs of the Trainer."
            )
            logger.warning(text, epochs, min(ends))
        return min(ends, default=None)

    def next_length(self, trainer: L.Trainer, steps_per_batch: int) -> int:
        """Batches of the epoch that ``trainer`` begins, or goes on with, now.

        Lightning counts the batches of a resumed epoch from its start, and so does this.
        """
        room = -(-(trainer.max_steps - trainer.global_step) // steps_per_batch)
        if self._num_rows is None:
            if not self._is_begun:
                _say_without_effect(trainer)
            self._is_begun = True
            return max(1, room) if trainer.max_steps > 0 else ENDLESS
        loop = trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        if loop.restarting and not self._is_begun:
            _end_processed_epoch(loop)
        done = progress.current.ready if loop.restarting else 0
        is_resumed, self._is_begun = bool(done) and not self._is_begun, True
        if is_resumed:
            if self.left is None:
                self.left = self._num_rows - done * self._batch_size % self._num_rows
            count = max(0, self._batches(self.left))
        else:
            count = self._begin(is_limited=is_limited(trainer))
        is_first = trainer.current_epoch == 0 and (is_resumed or not done)
        if trainer.max_steps > 0 and is_first and type(trainer.limit_train_batches) is float:
            count = min(count, max(room, 0))  # fractions of a run that is no whole epoch
        if is_resumed or not done:
            return done + count or 1
        if count <= done:
            return count  # Lightning begins to count anew
        progress.is_last_batch = False  # of the epoch before, which had fewer batches
        return done + count

    def _begin(self, *, is_limited: bool) -> int:
        if self.left is None or is_limited:
            self.left = self._num_rows
        assert self.left is not None
        assert self._num_rows is not None
        while self.left <= 0:
            self.left += self._num_rows
        return self._batches(self.left)

    def _batches(self, groups: int) -> int:
        return -(-groups // self._batch_size)


def _end_processed_epoch(loop: Any) -> None:
    """End the epoch at whose end a checkpoint was saved: under ``max_steps`` Lightning repeats it.

    The repetition is empty, and would count as one of ``max_epochs``.
    """
    epoch = loop.epoch_progress
    if epoch.current.processed == epoch.current.started > epoch.current.completed:
        epoch.increment_completed()
        loop.epoch_loop.batch_progress.reset_on_run()


def _say_without_effect(trainer: L.Trainer) -> None:
    """Warn of what waits for an epoch's end, of a run whose only epoch ends with it."""
    interval: Any = trainer.val_check_interval
    flags = {
        "min_epochs": (trainer.min_epochs or 0) > 1,
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch not in (None, 1),
    }
    validates_within = type(interval) is int or (interval != 1.0 and trainer.max_steps > 0)
    if trainer.max_steps <= 0:  # a fraction of nothing known
        limit: Any = trainer.limit_train_batches
        flags["limit_train_batches"] = type(limit) is float and 0 < limit < 1
        flags["val_check_interval"] = type(interval) is float and interval != 1.0
    lost = [f"{name}={getattr(trainer, name)}" for name, is_lost in flags.items() if is_lost]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        name, waits = type(callback).__name__, not validates_within
        if isinstance(callback, ModelCheckpoint) and (every := callback._every_n_epochs) > 1:  # type: ignore
            lost.append(f"every_n_epochs={every} of {name}")
        if isinstance(callback, EarlyStopping) and (waits or callback._check_on_train_epoch_end):  # type: ignore
            lost.append(name)
    if lost and trainer.global_rank == 0:
        logger.warning(
            "the prompts are read one after another and their number is not known, so the run is "
            "one epoch: no effect have %s. Count in batches: val_check_interval=<batches>, "
            "limit_train_batches=<batches>, ModelCheckpoint(every_n_train_steps=<steps>).",
            ", ".join(lost),
        )


def planned_steps(trainer: L.Trainer, steps_per_batch: int) -> int | None:
    """Optimizer steps at which ``max_steps`` or the epochs end the run; None if it is not known."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches = data.planned_batches if isinstance(data, RunDataModule) else None
    ends = [] if batches is None else [batches * steps_per_batch]
    return min([*ends, *([trainer.max_steps] if trainer.max_steps > 0 else [])], default=None)


def is_limited(trainer: L.Trainer) -> bool:
    """Whether ``limit_train_batches`` makes an epoch a part of the prompts."""
    limit: Any = trainer.limit_train_batches
    return type(limit) is int or limit != 1.0


def with_passes(config: RolloutConfig, trainer: L.Trainer, *, goes_on: bool) -> RolloutConfig:
    """``config`` with ``num_epochs`` passes at most as many as ``max_epochs``.

    Args:
        config: settings of the rollouts.
        trainer: its ``max_epochs`` is left to it if an epoch is only a part of the prompts.
        goes_on: whether prompts begin in the middle, where the last fit has left them.

    Raises:
        ConfigError: if nothing ends the run.
    """
    epochs, passes = trainer.max_epochs, config.num_epochs
    if epochs is None or epochs < 0:
        has_timer = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore
        if passes is None and trainer.max_steps < 0 and not has_timer:
            raise ConfigError(
                "nothing ends this run: set the Trainer's max_steps, max_epochs or max_time, or "
                "num_epochs of the RolloutConfig."
            )
        return config
    epochs -= trainer.current_epoch
    if epochs < 1 or is_limited(trainer) or goes_on:
        return config
    if passes is not None and epochs < passes:
        logger.warning(
            "max_epochs=%d of the Trainer ends this run before num_epochs=%d passes over the "
            "prompts.",
            *(epochs, passes),
        )
    return replace(config, num_epochs=epochs if passes is None else min(epochs, passes))


def overfitted(
    rows: Sequence[Row] | IterableRows, trainer: L.Trainer | None, config: RolloutConfig
) -> Sequence[Row] | IterableRows:
    """The first rows, of as many batches as ``overfit_batches`` says: they come again and again.

    Raises:
        ConfigError: if it is a fraction of rows whose number is not known.
    """
    limit: Any = 0 if trainer is None or trainer.state.fn != "fit" else trainer.overfit_batches  # type: ignore
    if not limit:
        return rows
    if isinstance(limit, float):
        if isinstance(rows, IterableRows):
            raise ConfigError(
                f"overfit_batches={limit} is a fraction of prompts that are read one after "
                "another, whose number is not known: give a number of batches."
            )
        limit = max(1, int(-(-len(rows) // config.batch_size) * limit))
        assert trainer is not None
        trainer.limit_train_batches = limit  # the fraction, which is taken of all rows once
    return first_rows(rows, limit * config.batch_size)


def count_over_run(trainer: L.Trainer, num_batches: int) -> None:
    """Let a ``val_check_interval`` of more batches than an epoch has count over the whole run."""
    interval: Any = trainer.val_check_interval
    if type(interval) is int and interval > num_batches and trainer.check_val_every_n_epoch == 1:
        trainer.check_val_every_n_epoch = None
        logger.info(
            "val_check_interval=%d counts batches over the whole run: an epoch has %d.",
            *(interval, num_batches),
        )
