"""The segment-wise loss against numbers worked out by hand, at its bounds and at extremes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import segment_wise_ppo_loss
from support.float_rows import logs, row
from support.loss_cases import CENTRES, FREE, Case

torch.set_num_threads(1)


def test_two_tokens_worked_out_by_hand() -> None:
    # Token 1: b = .2, q = .3, x = .4, n = .45, A = 2: w = 1.5, r = 1.5 is clipped to 1.2, drift 2.
    #   w r A = 1.5 * 1.2 * 2 = 3.6, no gradient.
    # Token 2: b = .5, q = .4, x = .4, n = .38, A = -1: w = .8, r = .95, drift .8.
    #   w r A = .8 * .95 * -1 = -.76, and its gradient with respect to n is the same number.
    # Token 3: b = .1, x = .6: drift 6 is above the cap, so it counts in N alone. N = 3.
    # L = -(3.6 - .76) / 3 = -.946667; dL/dn = (0, .76 / 3, 0).
    case = Case(
        logs(0.45, 0.38, 0.6),
        logs(0.4, 0.4, 0.6),
        logs(0.3, 0.4, 0.11),
        logs(0.2, 0.5, 0.1),
        row(2.0, -1.0, 1.0),
        torch.ones(1, 3, dtype=torch.bool),
    )
    result = case.loss(LossConfig())
    assert result.loss.item() == pytest.approx(-2.84 / 3)
    assert torch.allclose(case.gradient(LossConfig()), row(0.0, 0.76 / 3, 0.0))
    assert result.kept.tolist() == [[True, True, False]]
    assert result.clipped.tolist() == [[True, False, False]]
    assert torch.allclose(result.log_weight, logs(1.5, 0.8, 1.1))
    assert torch.allclose(result.log_ratio, logs(1.5, 0.95, 0.6 / 0.11))


@pytest.mark.parametrize("centre", CENTRES)
def test_drift_that_a_near_centre_hides_is_rejected_by_the_default_cap(centre: str) -> None:
    case = Case(
        logs(0.2), logs(0.2), logs(0.011), logs(0.01), row(-1.0), torch.ones(1, 1, dtype=torch.bool)
    )
    config = LossConfig(trust_region=centre)
    assert not case.loss(config).kept.any()
    assert case.gradient(config).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("centre", CENTRES)
def test_a_tiny_weight_times_a_huge_ratio_is_finite_and_right(
    centre: str, advantage: float, dtype: torch.dtype
) -> None:
    # b = -10, q = -120, x = n = -1: q - b = -110 and x - q = 119, but n - b is only 9.
    config = dataclasses.replace(FREE, trust_region=centre, clip_epsilon_high=1e60)
    values = (-1.0, -1.0, -120.0, -10.0, advantage)
    case = Case(*(torch.full((1, 1), v, dtype=dtype) for v in values), torch.tensor([[True]]))
    expected = -advantage * math.exp(9)
    assert case.loss(config).loss.item() == pytest.approx(expected, rel=1e-4)
    assert case.gradient(config).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_rejected_token_whose_weight_overflows_has_no_gradient(
    centre: str, advantage: float
) -> None:
    values = (-0.1, -0.1, -150.0, -300.0, advantage)
    case = Case(*(torch.full((1, 1), value) for value in values), torch.tensor([[True]]))
    config = LossConfig(trust_region=centre)
    assert case.loss(config).loss.item() == 0.0
    assert case.gradient(config).item() == 0.0


BOUNDS = [
    ("at the cap", 5.0, True),
    ("above the cap", 5.001, False),
    ("at the floor", 0.25, True),
    ("below the floor", 0.2499, False),
]


@pytest.mark.parametrize("rejection_on", ["drift", "weight"])
@pytest.mark.parametrize(("drift", "kept"), [b[1:] for b in BOUNDS], ids=[b[0] for b in BOUNDS])
def test_bounds_are_inclusive_and_rejection_leaves_the_denominator_alone(
    rejection_on: str, drift: float, kept: bool
) -> None:
    config = LossConfig(
        trust_region="proximal", behavior_weight_floor=0.25, rejection_on=rejection_on
    )
    moved = torch.tensor([[0.0, math.log(drift)]])
    zero = torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = segment_wise_ppo_loss(moved, moved, moved, zero, zero + 1, mask, config=config)
    assert result.kept.tolist() == [[True, kept]]
    assert result.loss.item() == pytest.approx(-(1 + drift * kept) / 2)


@pytest.mark.parametrize("everything", ["rejected", "masked"])
def test_nothing_kept_is_zero_with_a_graph(everything: str) -> None:
    target = torch.full((2, 3), -1.0, requires_grad=True)
    far = torch.full((2, 3), -30.0)
    mask = torch.full((2, 3), everything == "rejected")
    result = segment_wise_ppo_loss(
        target, target.detach(), far, far, torch.ones(2, 3), mask, config=LossConfig()
    )
    assert not result.kept.any()
    assert result.loss.item() == 0.0
    result.loss.backward()
    assert target.grad is not None and torch.equal(target.grad, torch.zeros(2, 3))


def test_dual_clip_stops_the_gradient_of_a_bad_token_that_became_likely() -> None:
    case = Case(
        logs(0.9), logs(0.1), logs(0.1), logs(0.1), row(-1.0), torch.ones(1, 1, dtype=torch.bool)
    )
    assert case.loss(LossConfig()).loss.item() == pytest.approx(9.0)
    config = LossConfig(dual_clip=3.0)
    assert case.loss(config).loss.item() == pytest.approx(3.0)
    assert case.gradient(config).item() == 0.0
    assert case.loss(config).clipped.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_loss_is_at_least_float32(dtype: torch.dtype) -> None:
    case = Case.random(5)
    low = Case(*(tensor.to(dtype) for tensor in case.tensors()[:5]), case.mask)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    result = low.loss(LossConfig())
    assert (result.loss.dtype, result.log_weight.dtype) == (expected, expected)


def test_around_past_the_loss_takes_the_lags_itself() -> None:
    # n/b = 1.5 and n/q = 1.1 at lags 1 and 2; the range ends at 1.2. Around q both ratios are 1.1,
    # with w = q/b = 1.5 / 1.1. Around "past" the first is 1.5 around b, clipped to 1.2, with w = 1.
    b, q, n = logs(0.2, 0.2), logs(0.3 / 1.1, 0.3 / 1.1), logs(0.3, 0.3)
    mask = torch.ones(1, 2, dtype=torch.bool)
    lags = torch.tensor([[1, 2]])
    case = Case(n, n, q, b, row(1.0, 1.0), mask, lags)
    segment = case.loss(LossConfig(trust_region="segment"))
    past = case.loss(LossConfig(trust_region="past"))
    assert segment.loss.item() == pytest.approx(-1.5)
    assert past.loss.item() == pytest.approx(-(1.2 + 1.5) / 2)
    assert past.clipped.tolist() == [[True, False]]
    assert past.log_ratio.exp().flatten().tolist() == pytest.approx([1.5, 1.1])
