"""What a fit that goes on with a checkpoint says of itself, and puts in force."""

from __future__ import annotations

import logging

import lightning as L

from sdp_lightning.lightning.run_record import RunRecord, changes, table
from sdp_lightning.lightning.stop_request import is_time_up

logger = logging.getLogger(__name__)


def say_changes(old: RunRecord, new: RunRecord) -> None:
    """Print the settings that differ from those of the checkpoint."""
    if changed := changes(old.settings, new.settings):
        logger.warning("settings that are not those of the checkpoint:\n%s", table(changed))


def say_nothing_trained(trainer: L.Trainer) -> None:
    """Warn that the fit has trained on no batch, and say why."""
    if trainer.global_rank == 0:
        logger.warning("this fit trained nothing: %s.", _why_nothing(trainer))


def _why_nothing(trainer: L.Trainer) -> str:
    step, most, epochs = trainer.global_step, trainer.max_steps, trainer.max_epochs
    if 0 <= most <= step:
        return f"it began at step {step}, and max_steps={most}; raise max_steps to go on"
    if is_time_up(trainer):
        return "max_time was over before the first batch"
    if trainer.limit_train_batches == 0:
        return "limit_train_batches=0"
    if epochs is not None and 0 <= epochs <= trainer.current_epoch:
        return f"it began at epoch {trainer.current_epoch}, and max_epochs={epochs}"
    return "the prompts have ended, or a callback stopped it, before the first batch"
