"""One or several optimizers of a policy, which step together: one optimizer step of the run."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

_NUM_NAMED = 3


class OptimizerSet:
    """Several optimizers with the face of one.

    Args:
        policy: the model that they train.
        optimizers: one or more; together they have the policy's trained parameters.
        step: makes the step of one of them.

    Attributes:
        param_groups: those of all, in order.

    Raises:
        ConfigError: if they have none of the policy's trained parameters or one of them twice, or
            an optimizer needs a closure.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizers: Sequence[Optimizer],
        step: Callable[[Optimizer], object] = lambda optimizer: optimizer.step(),
    ) -> None:
        self._optimizers, self._step = tuple(optimizers), step
        for optimizer in self._optimizers:
            _refuse_closure(optimizer)
        owned = Counter(id(p) for group in self.param_groups for p in group["params"])
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        twice = [name for name, p in trained.items() if owned[id(p)] > 1]
        if twice:
            raise ConfigError(
                f"{_some(twice)} would be stepped twice: by two optimizers or groups."
            )
        left_out = {name: p for name, p in trained.items() if id(p) not in owned}
        if len(left_out) == len(trained):
            raise ConfigError(
                "configure_optimizers() returned no optimizer of a trained parameter of the "
                "policy: make it of self.parameters() there, after configure_model()."
            )
        if left_out:
            logger.warning(
                "no optimizer has %s: they stay as they are. trainable='<pattern>' says so, and "
                "saves their gradients.",
                _some([*left_out]),
            )
        self._left_out = tuple(left_out.values())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients, also those that no optimizer steps with."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for parameter in self._left_out:
            parameter.grad = None

    def step(self) -> None:
        """Step all."""
        for optimizer in self._optimizers:
            self._step(optimizer)

    @contextmanager
    def training(self) -> Generator[None]:
        """Context in which the policy has the weights that are trained.

        Of schedule-free optimizers, which have ``train()`` and ``eval()``, it has their averages
        outside of it: these are published, scored, evaluated and saved.
        """
        # foreign: only schedule-free optimizers have modes
        modal: list[Any] = [o for o in self._optimizers if callable(getattr(o, "eval", None))]
        for optimizer in modal:
            optimizer.train()
        try:
            yield
        finally:
            for optimizer in modal:
                optimizer.eval()


def _refuse_closure(optimizer: Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} computes the loss several times a step, by a closure, "
            "which a policy update does not have: use an optimizer that steps without one."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    return f"{len(names)} trained parameters ({shown}{', ...' * (len(names) > _NUM_NAMED)})"
