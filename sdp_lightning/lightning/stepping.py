"""What a module that steps its optimizers itself needs of them, whatever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from sdp_lightning.lightning.ending import guard_loggers
from sdp_lightning.lightning.schedules import ReadOptimizers, Schedules
from sdp_lightning.lightning.trainer_checks import refuse_spawn
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.optimizer_set import OptimizerSet


class SteppingModule(L.LightningModule, ABC):
    """A module that steps whatever ``configure_optimizers`` returns, by Lightning's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._schedules = Schedules()
        self._optimizer_set: OptimizerSet | None = None

    def __getstate__(self) -> dict[str, Any]:
        refuse_spawn()
        return super().__getstate__()

    @abstractmethod
    def require_policy(self) -> nn.Module:
        """The model that is trained."""

    def extra_loss(self, batch: Batch) -> Tensor | None:
        """A further loss, [], that each optimizer step adds to the policy's. None by default.

        It is computed under the weights that the step starts from, once a minibatch, on every rank;
        its gradient is averaged over ranks, and clipped with that of the policy's loss.

        Args:
            batch: the minibatch, on the device of the model.
        """
        return None

    @property
    def has_extra_loss(self) -> bool:
        """Whether a subclass defines :meth:`extra_loss`."""
        return type(self).extra_loss is not SteppingModule.extra_loss

    def configure_callbacks(self) -> list[Callback]:
        """The schedules. The first hook of a run: from here on its loggers are guarded."""
        guard_loggers(self.trainer)
        present: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if self._schedules in present else [self._schedules]

    def read_optimizers(self) -> None:
        """Read what ``configure_optimizers`` will return, for the fit that begins."""
        present: Any = self.configure_optimizers
        own = present.own if isinstance(present, ReadOptimizers) else present
        self._optimizer_set = None
        self.configure_optimizers = ReadOptimizers(own, self._schedules)

    def optimizer_set(self) -> OptimizerSet:
        """The optimizers of this fit, checked when they are first asked for.

        Raises:
            ConfigError: if they cannot train the policy.
        """
        if self._optimizer_set is None:
            made: Any = self.optimizers()
            first, *_ = several = made if isinstance(made, list) else [made]

            def step(optimizer: Any) -> None:
                if optimizer is first.optimizer:
                    first.step()  # counts as the Trainer's optimizer step, once for all of them
                else:
                    self.trainer.strategy.optimizer_step(optimizer, lambda: None)

            optimizers = [o.optimizer for o in several if isinstance(o, LightningOptimizer)]
            self._optimizer_set = OptimizerSet(self.require_policy(), optimizers, step)
        return self._optimizer_set

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """Log a metric, as Lightning does; schedules that wait for it learn of it."""
        if self._trainer is not None and self._trainer.barebones:
            return  # Lightning has said so, and would warn of every name
        super().log(name, value, *args, **settings)
        is_mean = bool(settings.get("on_epoch")) and not settings.get("on_step")
        in_training = self._trainer is not None and self.trainer.training
        self._schedules.note(name, is_mean_of_epoch=is_mean and in_training)
