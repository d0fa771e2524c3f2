"""What a fit that goes on with a checkpoint says of itself, and puts in force."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.optim.lr_scheduler import LambdaLR

from sdp_lightning.config.plain_settings import plain
from sdp_lightning.lightning.last_checkpoint import run_settings
from sdp_lightning.lightning.prompt_epochs import planned_steps
from sdp_lightning.lightning.run_record import KEY, RunRecord, changes, table
from sdp_lightning.lightning.stop_request import is_time_up

logger = logging.getLogger(__name__)


class RunOfFit:
    """The run that a fit is of: a new one, or that of the checkpoint which it goes on with."""

    def __init__(self, trainer: L.Trainer) -> None:
        self._record = RunRecord(run_settings(trainer))
        self._resumed: RunRecord | None = None
        # Of each group of each optimizer, as configured. Only what an optimizer is made with:
        # what it or a callback keeps beside that in a group is state.
        self._groups: list[list[dict[str, Any]]] = []

    def go_on_with(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Go on with the run of ``checkpoint``, and print what is set otherwise now.

        ``max_time`` counts this job, not those before it, whose time the checkpoint has.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for timer in callbacks:
            if isinstance(timer, Timer):
                checkpoint.get("callbacks", {}).pop(timer.state_key, None)
        if KEY not in checkpoint:
            return
        self._resumed = RunRecord.parsed(checkpoint[KEY])
        self._record = replace(self._record, id=self._resumed.id)
        changed = changes(self._resumed.settings, self._record.settings)
        if changed and trainer.global_rank == 0:
            logger.warning("settings that are not those of the checkpoint:\n%s", table(changed))

    def see_configured(self, trainer: L.Trainer) -> None:
        """Look at the optimizers after they are made, and before Lightning loads their state."""
        self._groups = [_groups(optimizer) for optimizer in trainer.optimizers]
        self._record = replace(self._record, groups=plain(self._groups))

    def write(self, checkpoint: dict[str, Any], version: int) -> None:
        """Let ``checkpoint``, of ``version``, know its run."""
        checkpoint[KEY] = self._record.text(version)

    def put_in_force(self, trainer: L.Trainer) -> None:
        """Set in the optimizers what was configured otherwise in the fit that is gone on with.

        Without it an optimizer goes on with the learning rate of the checkpoint.
        """
        old = () if self._resumed is None else self._resumed.groups
        factors: dict[int, list[float]] = {}
        for optimizer, groups, before in zip(trainer.optimizers, self._groups, old, strict=False):
            for group, new, saved in zip(optimizer.param_groups, groups, before, strict=False):
                changed = {n: v for n, v in new.items() if n in saved and plain(v) != saved[n]}
                factor = changed.pop("lr") / saved["lr"] if "lr" in changed else 1.0
                group.update(changed)
                group["lr"] *= factor
                factors.setdefault(id(optimizer), []).append(factor)
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            _follow(scheduler, factors.get(id(scheduler.optimizer), []))


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    made_with = inspect.signature(type(optimizer)).parameters.keys() - {"params"}
    return [
        {name: value for name, value in group.items() if name in made_with}
        for group in optimizer.param_groups
    ]


def _follow(scheduler: Any, factors: Sequence[float]) -> None:
    """Let a schedule go on from the new learning rates; a LambdaLR, which is new, by its own."""
    bases: Any = getattr(scheduler, "base_lrs", None)  # foreign: ReduceLROnPlateau has none
    if bases is None or len(bases) != len(factors):
        return
    scheduler.base_lrs = [base * factor for base, factor in zip(bases, factors, strict=True)]
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        for group, base, function in zip(
            groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * function(scheduler.last_epoch)
    for group, base in zip(groups, scheduler.base_lrs, strict=True):
        group["initial_lr"] = base
    vars(scheduler)["_last_lr"] = [group["lr"] for group in groups]


def say_if_unsaved(trainer: L.Trainer, steps_per_batch: int) -> None:
    """Warn if the Trainer's checkpoints all come at the end of the fit that begins."""
    savers: list[Any] = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    end = planned_steps(trainer, steps_per_batch)
    left = math.inf if end is None else end - trainer.global_step
    steps_of_epoch = trainer.num_training_batches * steps_per_batch
    validates = (
        trainer.enable_validation and (trainer.val_check_batch or 0) < trainer.num_training_batches
    )
    for saver in savers:
        every = saver._every_n_train_steps
        by_steps = every > 0 and every - trainer.global_step % int(every) < left
        by_epochs = 0 < saver._every_n_epochs * steps_of_epoch < left < math.inf
        by_validations = validates and not saver._should_save_on_train_epoch_end(trainer)
        if by_steps or by_epochs or by_validations or saver._train_time_interval is not None:
            return
    batches = left / steps_per_batch
    if savers and batches > 1 and trainer.global_rank == 0:
        logger.warning(
            "no checkpoint is saved before the end of this fit, so a kill loses all of it: add "
            "ModelCheckpoint(every_n_train_steps=%d) to the Trainer's callbacks, or set "
            "enable_checkpointing=False.",
            steps_per_batch * (10 if batches > 20 else math.ceil(batches / 2)),
        )


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
