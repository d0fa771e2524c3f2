"""An optimizer of the user's own, with or without a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from support.steps import Batches, StepRecorder, make_batch
from support.trainers import make_trainer, weights_of


class WithOwn(sdp.SegmentWisePPOModule):
    """A module whose ``configure_optimizers`` is ``make`` of its parameters."""

    make: Any

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def fit(folder: str, make: Any, steps: int = 2, **settings: Any) -> tuple[WithOwn, StepRecorder]:
    module, recorder = WithOwn(folder, **settings), StepRecorder()
    module.make = make
    trainer = make_trainer(recorder, max_steps=steps, limit_val_batches=0)
    trainer.fit(module, Batches(*[make_batch(folder, (2, 1))] * steps))
    return module, recorder


@pytest.mark.parametrize("scaled", [False, True], ids=["rate", "scaled rate"])
def test_an_optimizer_without_a_schedule_keeps_its_rate(model_folder: str, scaled: bool) -> None:
    """Also from step to step where one step's own rate is scaled."""
    optimizer = sdp.OptimizerConfig(scale_lr_by_ess=scaled, gradient_clip_val=None)
    module, seen = fit(model_folder, lambda ps: torch.optim.SGD(ps, lr=0.5), optimizer=optimizer)
    assert seen.rates == [pytest.approx(0.5)] * 2 or scaled
    rate = seen.metrics["train/lr"]
    assert (rate < 0.5) if scaled else (rate == 0.5)
    weights, before = weights_of(module), seen.weights[-1]
    for name, gradient in seen.gradients[-1].items():
        torch.testing.assert_close(weights[name], before[name] - rate * gradient)
    (kept,) = (group["lr"] for group in module.optimizers().param_groups)
    assert kept == 0.5


def test_a_schedule_of_one_s_own_multiplies_the_rate_it_finds(model_folder: str) -> None:
    def make(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]

    settings = sdp.OptimizerConfig(scale_lr_by_ess=True)
    module, _ = fit(model_folder, make, steps=3, optimizer=settings)
    (kept,) = (group["lr"] for group in module.optimizers().param_groups)
    assert kept == pytest.approx(0.5 * 0.1**3)


def two_optimizers(parameters: Any) -> Any:
    halves = parameters[:3], parameters[3:]
    return [torch.optim.SGD(half, lr=0.1) for half in halves]


def waiting_scheduler(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    waits = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": waits, "monitor": "train/reward"}


@pytest.mark.parametrize(
    ("make", "count"),
    [(two_optimizers, "2 optimizers"), (waiting_scheduler, "ReduceLROnPlateau")],
    ids=["two", "a metric"],
)
def test_what_a_step_cannot_use_is_refused(model_folder: str, make: Any, count: str) -> None:
    with pytest.raises(sdp.ConfigError, match=rf"returned {count}: the policy is updated by one"):
        fit(model_folder, make)
