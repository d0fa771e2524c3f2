"""An optimizer of the user's own, with or without a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from support.own_optimizers import WithOwn, muon_and_adamw, plateau
from support.steps import Batches, StepRecorder, make_batch
from support.trainers import make_trainer, weights_of


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


def test_muon_and_adamw_step_together_and_count_as_one(model_folder: str) -> None:
    """The steps are those of the two by hand on the clipped gradients, and are counted once."""
    settings = sdp.OptimizerConfig(gradient_clip_val=0.01)
    module, seen = fit(model_folder, muon_and_adamw, steps=3, optimizer=settings)
    assert module.trainer.global_step == 3 and len(seen.gradients) == 2 * 3
    start = {n: torch.nn.Parameter(w) for n, w in seen.weights[0].items()}
    optimizers, schedules = muon_and_adamw(list(start.values()))
    for step, gradients in enumerate(seen.gradients[::2], 1):  # each optimizer's hook sees all
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)
        for name, gradient in gradients.items():
            start[name].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        schedules[0].step()
        if step == 2:
            schedules[1]["scheduler"].step()
    for name in seen.gradients[0]:
        torch.testing.assert_close(weights_of(module)[name], start[name].detach(), msg=name)
    muon, adamw = (o.param_groups[0]["lr"] for o in module.optimizers())
    assert (muon, adamw) == (pytest.approx(0.05 / 8), pytest.approx(0.5 / 2))


class Closed(torch.optim.LBFGS):
    """An optimizer that needs the loss several times."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: [torch.optim.SGD(ps, lr=1), torch.optim.SGD(ps[:2], lr=1)], "stepped twice"),
        (lambda ps: Closed(ps, lr=1), "Closed computes the loss several times"),
        (lambda ps: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), "no optimizer of a tr"),
        (lambda ps: None, "returned None"),
        (lambda ps: [], r"returned \[\]"),
    ],
    ids=["twice", "closure", "a stranger's", "none", "empty"],
)
def test_what_cannot_train_the_policy_is_refused(
    model_folder: str, make: Any, message: str
) -> None:
    with pytest.raises(sdp.ConfigError, match=message):
        fit(model_folder, make)


def test_parameters_without_an_optimizer_stay_and_are_named(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor do their gradients pile up in the norm that is clipped."""
    unclipped = sdp.OptimizerConfig(gradient_clip_val=None)
    module, seen = fit(
        model_folder, lambda ps: torch.optim.SGD(ps[:1], lr=0.1), optimizer=unclipped
    )
    (left_out,) = (m for m in caplog.messages if "no optimizer has" in m)
    assert "they stay as they are" in left_out
    weights, first = weights_of(module), seen.weights[0]
    (trained,) = (n for n in seen.gradients[0] if not weights[n].equal(first[n]))
    norm = float(seen.gradients[-1][trained].norm())
    assert seen.metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


# Schedules that wait for a metric -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "times"),
    [({}, 4), ({"frequency": 2}, 2), ({"interval": "step"}, 4), ({"interval": "epoch"}, 1)],
    ids=["as logged", "every second", "batch", "epoch"],
)
def test_a_plateau_schedule_hears_its_metric(
    model_folder: str, settings: dict[str, Any], times: int
) -> None:
    update = sdp.UpdateConfig(num_minibatches=2)
    module, recorder = WithOwn(model_folder, update=update), StepRecorder()
    module.make = plateau("train/reward", **settings)
    batches = [make_batch(model_folder, (2, 2), seed=seed) for seed in range(4)]
    trainer = make_trainer(recorder, max_steps=8, limit_val_batches=0)
    trainer.fit(module, Batches(*batches))
    rewards = [float(batch.rewards.mean()) for batch in batches]
    schedule: Any = module.lr_schedulers()
    assert schedule.heard == pytest.approx(rewards[len(rewards) // times - 1 :: 4 // times])
    # The first value is the best so far; each later one misses the threshold and halves the rate.
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.5 * 0.5 ** (times - 1))


def test_a_metric_that_is_never_logged_is_named_after_the_first_batch(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match=r"monitors 'train/rewards', which is not logged.*tr"):
        fit(model_folder, plateau("train/rewards"), steps=4)


def test_a_schedule_that_never_advances_is_said(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit(model_folder, plateau("val/rewards", strict=False))
    assert "the schedule Heard never advanced: it waited for val/rewards." in caplog.messages
