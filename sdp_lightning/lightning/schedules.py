"""Learning rate schedules as Lightning has them, for a module that steps its optimizers itself.

Lightning drops a schedule's metric under manual optimization, so what ``configure_optimizers``
returns is read here first.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core import optimizer as lightning_optimizer

from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

When = Literal["step", "batch", "epoch", "logged"]


@dataclass(eq=False)
class _Plan:
    """When a schedule advances: every ``config.frequency`` times that ``when`` comes."""

    config: Any  # Lightning's LRSchedulerConfig
    when: When
    count: int = 0

    @property
    def monitor(self) -> str | None:
        return self.config.monitor if self.config.reduce_on_plateau else None

    @property
    def name(self) -> str:
        return type(self.config.scheduler).__name__

    def advance(self, *metric: Any) -> None:
        self.count += 1
        if self.count % self.config.frequency == 0:
            self.config.scheduler.step(*metric)


class Schedules(Callback):
    """Advances the schedules that ``configure_optimizers`` returned.

    A schedule advances at every optimizer step that is made, or at the end of an epoch with
    ``"interval": "epoch"``. One that monitors a metric advances with each new value of it, or with
    an interval once a batch or epoch; ``"frequency": n`` is every n-th time.
    """

    def __init__(self) -> None:
        self._plans: list[_Plan] = []
        self._counts: list[int] = []  # of a checkpoint
        self._fresh: set[str] = set()  # names of metrics with a new value
        self._of_epoch: set[str] = set()
        self._logged: set[str] = set()
        self._has_validated = False

    def read(self, returned: Any) -> Any:
        """Keep the schedules of what ``configure_optimizers`` returned; the same for Lightning.

        Raises:
            ConfigError: if there is no optimizer.
            MisconfigurationException: by Lightning, of a form that it does not know.
        """
        if not returned:
            raise ConfigError(f"configure_optimizers() returned {returned}: nothing is trained.")
        parse: Any = lightning_optimizer._configure_optimizers  # type: ignore[reportPrivateUsage]
        optimizers, schedulers, monitor = parse(returned)
        given = [_as_dict(each, monitor) for each in schedulers]
        complete = [each if _waits(each) else {"interval": "step"} | each for each in given]
        # As of an automatic optimization: with metrics.
        configs = lightning_optimizer._configure_schedulers_automatic_opt(complete, None)  # type: ignore
        self._plans = [_Plan(c, _when(c, g)) for c, g in zip(configs, given, strict=True)]
        for plan, count in zip(self._plans, self._counts, strict=False):
            plan.count = count
        self._counts = []
        kept = ("scheduler", "name", "interval", "frequency")
        return optimizers, [{key: getattr(c, key) for key in kept} for c in configs]

    def step(self) -> None:
        """An optimizer step was made."""
        for plan in self._plans:
            if plan.when == "step":
                plan.advance()

    def note(self, name: str, *, is_mean_of_epoch: bool) -> None:
        """A metric was logged. ``is_mean_of_epoch``: its value is known at the end of the epoch."""
        (self._of_epoch if is_mean_of_epoch else self._fresh).add(name)
        self._logged.add(name)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fresh, self._of_epoch, self._logged = set(), set(), set()
        self._has_validated = not trainer.enable_validation

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._advance(trainer, "batch")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fresh |= self._of_epoch
        self._advance(trainer, "epoch")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._has_validated = True
            self._advance(trainer, "validation")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for plan in self._plans:
            if plan.count == 0 and trainer.global_step:
                awaited = plan.monitor or ("an epoch" if plan.when == "epoch" else "a step")
                text = "the schedule %s never advanced: it waited for %s."
                logger.warning(text, plan.name, awaited)

    def state_dict(self) -> dict[str, Any]:
        counts = [plan.count for plan in self._plans]
        return {"counts": counts} if any(p.config.frequency > 1 for p in self._plans) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = list(state_dict["counts"])

    def _advance(self, trainer: L.Trainer, what: str) -> None:
        fresh, self._fresh = self._fresh, set()
        for plan in self._plans:
            is_due = plan.when == what or (plan.when == "logged" and _base(plan.monitor) in fresh)
            if plan.monitor is not None and plan.monitor not in trainer.callback_metrics:
                self._require(plan, trainer)
            elif is_due and plan.monitor is not None:
                plan.advance(trainer.callback_metrics[plan.monitor])
            elif is_due:
                plan.advance()

    def _require(self, plan: _Plan, trainer: L.Trainer) -> None:
        """Refuse to wait for a metric that a batch and, if there is one, a validation lack."""
        is_known = not self._has_validated or not trainer.global_step
        if is_known or not plan.config.strict or _base(plan.monitor) in self._logged:
            return
        raise ConfigError(
            f"the schedule {plan.name} monitors {plan.monitor!r}, which is not logged. There are: "
            f"{', '.join(sorted(trainer.callback_metrics))}."
        )


class ReadOptimizers:
    """``configure_optimizers`` of a module; its schedules are kept for this fit."""

    def __init__(self, own: Callable[[], Any], schedules: Schedules) -> None:
        functools.update_wrapper(self, own)  # Lightning looks whether it is overridden
        self.own, self._schedules = own, schedules

    def __call__(self) -> Any:
        return self._schedules.read(self.own())


def _as_dict(scheduler: Any, monitor: str | None) -> dict[str, Any]:
    given = dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler}
    return {"monitor": monitor} | given if _waits(given) and monitor else given


def _waits(given: dict[str, Any]) -> bool:
    plateau = isinstance(given.get("scheduler"), torch.optim.lr_scheduler.ReduceLROnPlateau)
    return bool(given.get("reduce_on_plateau", plateau))


def _when(config: Any, given: dict[str, Any]) -> When:
    if not config.reduce_on_plateau:
        return config.interval
    if "interval" not in given:
        return "logged"
    return "batch" if config.interval == "step" else "epoch"


def _base(metric: str | None) -> str | None:
    """The name under which a metric was logged that Lightning has by step and by epoch."""
    return metric and metric.removesuffix("_step").removesuffix("_epoch")
