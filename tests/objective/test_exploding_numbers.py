"""One token far off outweighs no batch: exponents are bounded, and rejected tokens left out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig
from sdp_lightning.objective.kl import LARGEST_LOG_RATIO, kl_estimate, kl_penalised_rewards
from sdp_lightning.objective.precision import LARGEST_LOG, bounded_log
from sdp_lightning.training.batch import Batch, collate
from sdp_lightning.training.loss import batch_loss
from support.float_rows import every, row
from support.loss_cases import CENTRES, FREE, Case

NUM_TOKENS = 4000
EDGE = math.expm1(6.0)  # 402.43: the largest slope of k3


@pytest.fixture(scope="module")
def batch() -> Batch:
    """4,000 tokens of log-prob -0.1 under b and the reference; advantages 1 and -1 in turn."""
    segment = sdp.Segment(0, np.full(NUM_TOKENS, 5), np.full(NUM_TOKENS, -0.1))
    trajectory = sdp.Trajectory((sdp.Context([3]), segment), reward=1.0)
    made = collate([sdp.TrajectoryGroup((trajectory,))], version=0)
    sign = 1 - 2 * (torch.arange(NUM_TOKENS + 1) % 2)
    return dataclasses.replace(
        made,
        advantages=sign[None].float(),
        reference_logprobs=torch.where(made.loss_mask, -0.1, 0.0),
    )


def gradient(batch: Batch, far: float, **settings: Any) -> Tensor:
    """[T] of the loss with respect to n, which is -0.1 but for one token of log-prob ``far``."""
    target = torch.full_like(batch.behavior_logprobs, -0.1)
    target[0, 7] = far
    target.requires_grad_()
    config = LossConfig(behavior_weight_floor=0.5, **settings)
    loss = batch_loss(target, batch, config=config, denominator=float(NUM_TOKENS)).loss
    return torch.autograd.grad(loss, target)[0][0]


@pytest.mark.parametrize("estimator", ["k2", "k3", "weighted_k3"])
@pytest.mark.parametrize("far", [-12.1, -89.1, -1e4])
def test_a_rejected_token_is_left_out_of_the_kl(batch: Batch, far: float, estimator: str) -> None:
    without = gradient(batch, far)
    found = gradient(batch, far, kl_coefficient=0.01, kl_estimator=estimator)
    assert found[7] == without[7] == 0
    assert found.norm() == pytest.approx(NUM_TOKENS**-0.5, rel=1e-3)  # that of the policy: 0.016
    # The token beside it has moved by nothing, so the KL there has no slope.
    assert torch.equal(found, without)


@pytest.mark.parametrize("far", [-12.1, -89.1, -1e4])
def test_a_rejected_token_that_is_asked_for_pulls_by_at_most_e_to_the_6(
    batch: Batch, far: float
) -> None:
    found = gradient(batch, far, kl_coefficient=0.01, kl_tokens="all")
    assert found[7] == pytest.approx(-0.01 * EDGE / NUM_TOKENS)  # -0.001, where k3 has -0.41
    whole = gradient(batch, far, kl_coefficient=0.01, kl_tokens="all", kl_estimator="weighted_k3")
    distance = far + 0.1
    assert whole[7] == pytest.approx(0.01 * math.exp(distance) * distance / NUM_TOKENS)


def test_the_logged_kl_has_rejected_tokens_too_and_is_finite(batch: Batch) -> None:
    target = torch.where(batch.loss_mask, -0.1, 0.0)
    target[0, 7] = -89.1
    config = LossConfig(behavior_weight_floor=0.5, kl_coefficient=0.01)
    result = batch_loss(target, batch, config=config, denominator=float(NUM_TOKENS))
    assert not result.policy.kept[0, 7]
    assert result.kl[0, 7].item() == pytest.approx(EDGE - 6 + EDGE * 83)


def test_k3_goes_on_as_its_tangent_above_6_nats() -> None:
    assert LARGEST_LOG_RATIO == 6.0
    distance = row(-40.0, 5.9, 6.0, 6.5, 12.0, 89.0, 1e5)
    target = (-distance).requires_grad_()
    found = kl_estimate(target, torch.zeros_like(target), every(7), "k3")
    (slope,) = torch.autograd.grad(found.sum(), target)
    inside, outside = distance[0, :3], distance[0, 3:]
    assert torch.equal(found[0, :3].detach(), inside.expm1() - inside)
    assert torch.allclose(found[0, 3:].detach(), EDGE - 6 + EDGE * (outside - 6))
    assert torch.allclose(slope[0, :3], -inside.expm1())
    assert torch.allclose(slope[0, 3:], torch.full_like(outside, -EDGE))


def test_k2_goes_on_as_its_tangent_beyond_6_nats_either_way() -> None:
    distance = row(-1e4, -7.0, -6.0, -0.5, 6.0, 7.0, 1e4)
    target = (-distance).requires_grad_()
    found = kl_estimate(target, torch.zeros_like(target), every(7), "k2")
    (slope,) = torch.autograd.grad(found.sum(), target)
    assert found[0].tolist() == pytest.approx([59_982, 24, 18, 0.125, 18, 24, 59_982])
    assert slope[0].tolist() == [6, 6, 6, 0.5, -6, -6, -6]


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 84.3, 1), ("k2", 6 * 84.3 - 18, 6), ("k3", 83.3, 1), ("weighted_k3", 83.3, 84.3)],
)
def test_a_token_that_the_reference_rules_out_has_a_finite_kl_that_pushes_it_down(
    estimator: Any, value: float, slope: float
) -> None:
    """n = b = -3, and the least log-prob of float32 is -87.34."""
    target, behavior = row(-3.0).requires_grad_(), row(-3.0)
    found = kl_estimate(target, row(-math.inf), every(1), estimator, behavior=behavior)
    (gradient,) = torch.autograd.grad(found.sum(), target)
    assert found.item() == pytest.approx(value, abs=0.3)
    assert gradient.item() == pytest.approx(slope, abs=0.05)
    if estimator != "weighted_k3":  # refused in the reward
        rewards = kl_penalised_rewards(
            *(torch.ones(1), behavior, row(-math.inf), every(1)),
            coefficient=0.1,
            estimator=estimator,
        )
        assert rewards.item() == pytest.approx(1 - 0.1 * found.item())


def test_the_weighted_k3_worked_out_by_hand() -> None:
    # n = .2, b = .1, ref = .4: 2 (2 - 1 - ln 2) = .6137, slope 2 ln .5.
    # n = .4, b = .8, ref = .1: (.25 - 1 + ln 4) / 2, slope ln 4 / 2.
    # n - b = 30: the weight is e^6; n - ref = 1: e^6 / e, slope e^6.
    target = torch.tensor([[math.log(0.2), math.log(0.4), -1.0, 0.0]]).requires_grad_()
    behavior = torch.tensor([[math.log(0.1), math.log(0.8), -31.0, math.nan]])
    reference = torch.tensor([[math.log(0.4), math.log(0.1), -2.0, math.inf]])
    mask = torch.tensor([[True, True, True, False]])
    found = kl_estimate(target, reference, mask, "weighted_k3", behavior=behavior)
    (slope,) = torch.autograd.grad(found.sum(), target)
    values = [2 - 2 * math.log(2), (math.log(4) - 0.75) / 2, math.exp(5), 0.0]
    assert found[0].tolist() == pytest.approx(values)
    assert slope[0].tolist() == pytest.approx([-2 * math.log(2), math.log(4) / 2, math.exp(6), 0.0])
    with pytest.raises(ValueError, match=r"exp\(n - b\): pass behavior="):
        kl_estimate(target, reference, mask, "weighted_k3")


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("surrogate", ["ppo", "unclipped"])
@pytest.mark.parametrize("moved", [50.0, 99.9, 1e4])
def test_a_bad_token_that_became_likely_is_pushed_down_by_a_finite_gradient(
    centre: str, surrogate: str, moved: float
) -> None:
    # A = -1, q = x = b: drift 1 is within every cap, and n is `moved` above all three.
    b = torch.tensor([[-1e4 - 1.0]])
    case = Case(b + moved, b, b, b, torch.tensor([[-1.0]]), every(1))
    behavior = surrogate == "unclipped"
    config = LossConfig(surrogate=surrogate, trust_region="behavior" if behavior else centre)  # pyright: ignore[reportArgumentType]
    most = math.exp(LARGEST_LOG)
    assert case.loss(config).loss.item() == pytest.approx(most * (moved - 19), rel=1e-4)
    assert case.gradient(config).item() == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_weight_that_no_cap_bounds_is_finite(advantage: float) -> None:
    # q is 200 nats above b and x = n = b: the drift is 1, the weight e^200.
    b = torch.tensor([[-300.0, -1.0]])
    n, q = torch.tensor([[-100.0, -1.0]]), torch.tensor([[-100.0, -1.0]])
    case = Case(n, b, q, b, torch.full((1, 2), advantage), every(2))
    assert case.loss(LossConfig()).kept.all()
    slope = case.gradient(LossConfig())
    assert slope.isfinite().all() and slope[0, 1].item() == pytest.approx(-advantage / 2)
    assert slope[0, 0].item() == pytest.approx(-advantage * math.exp(LARGEST_LOG) / 2, rel=1e-6)


def test_below_the_bound_nothing_changes_by_a_bit() -> None:
    value = torch.linspace(-80, LARGEST_LOG, 4001).requires_grad_()
    assert torch.equal(bounded_log(value), value)
    (slope,) = torch.autograd.grad(bounded_log(value).exp().sum(), value)
    assert torch.equal(slope, value.detach().exp())


def test_the_bound_is_on_the_whole_exponent_not_on_the_ratio() -> None:
    # log w = -110 and log r = 119 (see test_loss_by_hand): the product is e^9, far from the bound.
    config = dataclasses.replace(FREE, trust_region="segment")
    values = (-1.0, -1.0, -120.0, -10.0, -1.0)
    case = Case(*(torch.full((1, 1), v) for v in values), every(1))
    assert case.gradient(config).item() == pytest.approx(math.exp(9), rel=1e-4)
