"""Flags and callbacks of Lightning that are translated for this package, or refused, before a run.

It is the first hook of a run, before Lightning refuses what manual optimization cannot do. The
table of all flags and callbacks is docs/reference/trainer-flags.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint

from sdp_lightning.config import OptimizerConfig, UpdateConfig
from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

_AVERAGE = (
    "averages weights in this process, while rollouts and evaluations are sampled from the weights "
    "of the last step. Leave it out, and lower the learning rate at the end: "
    "OptimizerConfig(schedule='cosine')."
)
_LR = "runs steps of its own, which would publish versions. Set lr of the OptimizerConfig."
_BATCH = (
    "searches by running steps of its own. Set batch_size of the RolloutConfig and "
    "max_tokens_per_microbatch of the UpdateConfig."
)
_TRAINABLE = (
    "freezes and unfreezes layers behind the optimizer. Use trainable='<regular expression>' or "
    "lora=LoRAConfig() of the SegmentWisePPOModule."
)
_PRUNING = "replaces parameters, which then have no names to be published under. Leave it out."
_ACCUMULATION = (
    "is of no use here: the gradients of a batch are accumulated over micro-batches already. Set "
    "batch_size of the RolloutConfig."
)
_SPIKE = "asks the training step for its loss, which is taken over minibatches. Watch train/loss."
# A base class of Lightning, and why no callback of its kind can work.
REFUSED_CALLBACKS = {
    "WeightAveraging": _AVERAGE,
    "StochasticWeightAveraging": _AVERAGE,
    "LearningRateFinder": _LR,
    "BatchSizeFinder": _BATCH,
    "BaseFinetuning": _TRAINABLE,
    "ModelPruning": _PRUNING,
    "GradientAccumulationScheduler": _ACCUMULATION,
    "SpikeDetection": _SPIKE,
}
_LOG_DEFAULT = 50  # of Lightning


class _AnyStepOf(int):
    """``every_n_train_steps`` of a ModelCheckpoint, due at the next end of a batch.

    Lightning asks ``global_step % n == 0``, and only ends of batches are asked about. The first one
    at or after a multiple of n has a rest below the steps of a batch.
    """

    steps_per_batch: int

    def __rmod__(self, step: int) -> int:
        rest = int(step) % int(self)
        return 0 if rest < self.steps_per_batch else rest


class _AfterInterval(int):
    """``every_n_train_steps`` of a ModelCheckpoint that saves every ``train_time_interval``.

    Under manual optimization Lightning asks only for the steps, ``every < 1 or global_step % every
    != 0``, and saves by time never. The clock is rank 0's.
    """

    saver: Any
    trainer: Any

    def __lt__(self, other: int) -> bool:
        return False

    def __rmod__(self, step: int) -> int:
        seconds = time.monotonic() - self.saver._last_time_checked
        is_due = seconds >= self.saver._train_time_interval.total_seconds()
        return 0 if self.trainer.strategy.broadcast(is_due) else 1


def prepare_trainer(
    trainer: L.Trainer, update: UpdateConfig, optimizer: OptimizerConfig
) -> OptimizerConfig:
    """Translate the Trainer's flags, add a ``WeightSyncCallback`` if there is none, or refuse.

    Returns:
        ``optimizer``, with the Trainer's ``gradient_clip_val`` if that is set.

    Raises:
        ConfigError: naming a flag or callback that cannot work, and the setting to use.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    refuse_callbacks(callbacks)
    _publish_weights(trainer)
    if trainer.state.fn != "fit":
        return optimizer
    _refuse_accumulation(trainer)
    if (trial := int(trainer.fast_dev_run)) and trainer.max_steps == trial:  # type: ignore
        trainer.fit_loop.epoch_loop.max_steps = trial * update.steps_per_batch
    if trainer.loggers and trainer.log_every_n_steps == _LOG_DEFAULT:  # type: ignore
        logger.info("log_every_n_steps=%d is Lightning's default: every step is logged.", 50)
        trainer.log_every_n_steps = 1  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            _save_at_ends_of_batches(callback, update.steps_per_batch, trainer)
    return _take_clipping(trainer, optimizer)


def refuse_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise a ConfigError for the first callback that cannot work."""
    for callback in callbacks:
        for kind in type(callback).__mro__:
            reason = REFUSED_CALLBACKS.get(kind.__name__)
            if reason and kind.__module__.startswith(lightning_callbacks.__name__):
                raise ConfigError(f"{type(callback).__name__} {reason}")


def _publish_weights(trainer: L.Trainer) -> None:
    from sdp_lightning.lightning.datamodule import RolloutDataModule

    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, RolloutDataModule) and add_weight_sync(trainer):
        logger.info("A WeightSyncCallback() is added to the callbacks: it publishes the weights.")


def add_weight_sync(trainer: L.Trainer) -> bool:
    """Put a ``WeightSyncCallback`` before the other callbacks if there is none; whether it did."""
    from sdp_lightning.lightning.weight_sync import WeightSyncCallback

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WeightSyncCallback) for callback in callbacks):
        return False
    callbacks.insert(0, WeightSyncCallback())
    return True


def _refuse_accumulation(trainer: L.Trainer) -> None:
    number: int = trainer.accumulate_grad_batches  # type: ignore[attr-defined]
    if number != 1:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = data.rollout.batch_size
        raise ConfigError(
            f"accumulate_grad_batches={number}: every batch is an optimizer step of its own, "
            "accumulated over micro-batches. For the same effect leave it out, and set "
            f"batch_size={size * number} in place of {size} in the RolloutConfig."
        )


def _take_clipping(trainer: L.Trainer, optimizer: OptimizerConfig) -> OptimizerConfig:
    clip: float | None = trainer.gradient_clip_val  # type: ignore[attr-defined]
    if clip is None:
        return optimizer
    algorithm: Any = trainer.gradient_clip_algorithm  # type: ignore[attr-defined]
    if clip and algorithm not in (None, "norm"):
        raise ConfigError(
            f"gradient_clip_algorithm={str(algorithm.value)!r}: gradients are clipped by their "
            "norm. Leave it out, and set gradient_clip_val of the OptimizerConfig."
        )
    trainer.gradient_clip_val = None  # type: ignore[attr-defined]  # refused with own steps
    own, default = optimizer.gradient_clip_val, OptimizerConfig().gradient_clip_val
    level = logging.INFO if own in (default, clip or None) else logging.WARNING
    told = "gradient_clip_val=%s of the Trainer is in force, in place of %s of the OptimizerConfig."
    logger.log(level, told, clip, own)
    return replace(optimizer, gradient_clip_val=clip or None)


def _save_at_ends_of_batches(saver: Any, steps_per_batch: int, trainer: L.Trainer) -> None:
    every = saver._every_n_train_steps
    if saver._train_time_interval is not None:
        saver._every_n_train_steps = timed = _AfterInterval(every)
        timed.saver, timed.trainer = saver, trainer
        return
    if steps_per_batch > 1 and every > 1:
        saver._every_n_train_steps = due = _AnyStepOf(every)
        due.steps_per_batch = steps_per_batch
