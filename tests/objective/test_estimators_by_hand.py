"""Losses of the estimator family against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import (
    loglinear_proximal,
    loglinear_segment,
    loss_denominator,
    second_moment_bound,
    second_moment_set,
    within_second_moment,
)
from sdp_lightning.objective.aggregation import token_shares
from support.float_rows import every, logs, row
from support.loss_cases import CENTRES, Case

torch.set_num_threads(1)


def test_cispo_worked_out_by_hand() -> None:
    # Weights exp(n - b) = 2 and .5, clamped to 1.2 and .5; A = 1 and -1; N = 2.
    # L = -(1.2 ln .4 - .5 ln .1) / 2; dL/dn = (-.6, .25).
    n, b = logs(0.4, 0.1), logs(0.2, 0.2)
    case = Case(n, b, b, b, row(1.0, -1.0), every(2))
    config = LossConfig(surrogate="cispo", trust_region="behavior")
    result = case.loss(config)
    assert result.loss.item() == pytest.approx(-(1.2 * math.log(0.4) - 0.5 * math.log(0.1)) / 2)
    assert torch.allclose(case.gradient(config), row(-0.6, 0.25))
    assert result.clipped.tolist() == [[True, False]]


def test_tis_worked_out_by_hand() -> None:
    # w = exp(x - b) = 3, .25, 1.1, clamped to 2, .5, 1.1; r = 1.1; A = 1, 1, -1; N = 3.
    # L = -(2.2 + .55 - 1.21) / 3.
    b = logs(0.1, 0.4, 0.2)
    x = logs(0.3, 0.1, 0.22)
    case = Case(x + math.log(1.1), x, x, b, row(1.0, 1.0, -1.0), every(3))
    config = LossConfig(
        trust_region="proximal",
        correction="truncate",
        rejection_on="weight",
        behavior_weight_cap=2.0,
        behavior_weight_floor=0.5,
    )
    assert case.loss(config).loss.item() == pytest.approx(-1.54 / 3)
    assert torch.allclose(case.gradient(config), row(-2.2, -0.55, 1.21) / 3)


def test_sequence_masks_worked_out_by_hand() -> None:
    # Row 1: drifts 1.5, 1.5: product 2.25, mean 1.5. Row 2: 4, .25: product and mean 1.
    b = torch.zeros(2, 2, dtype=torch.float64)
    x = torch.tensor([[1.5, 1.5], [4.0, 0.25]], dtype=torch.float64).log()
    case = Case(x, x, x, b, torch.ones_like(b), torch.ones(2, 2, dtype=torch.bool))
    for level, cap, kept in (
        ("sequence", 2.0, [False, True]),
        ("sequence", 2.5, [True, True]),
        ("geometric", 1.6, [True, True]),
        ("geometric", 1.4, [False, True]),
    ):
        config = LossConfig(rejection_level=level, behavior_weight_cap=cap)  # pyright: ignore[reportArgumentType]
        assert case.loss(config).kept.all(1).tolist() == kept
        assert case.loss(config).kept.any(1).tolist() == kept
    by_token = case.loss(LossConfig(behavior_weight_cap=2.0, behavior_weight_floor=0.5)).kept
    assert by_token.tolist() == [[True, True], [False, False]]


def test_gspo_worked_out_by_hand() -> None:
    # Ratios 4 and 1: s = 2, clipped to 1.2 for A = 1; as A = -1 it is not, and the gradient of each
    # of two tokens is s / 2, over one sequence.
    n, b = logs(0.4, 0.3), logs(0.1, 0.3)
    config = LossConfig(
        ratio_level="sequence",
        trust_region="behavior",
        aggregation="sequence",
        behavior_weight_cap=None,
    )
    up = Case(n, b, b, b, row(1.0, 1.0), every(2))
    assert up.loss(config).loss.item() == pytest.approx(-1.2)
    assert up.loss(config).clipped.all() and not up.gradient(config).any()
    down = Case(n, b, b, b, row(-1.0, -1.0), every(2))
    assert down.loss(config).loss.item() == pytest.approx(2.0)
    assert torch.allclose(down.gradient(config), row(1.0, 1.0))


def test_the_behavior_mask_worked_out_by_hand() -> None:
    # x/b = 1.3, 1.3, .7, .7 with A = 1, -1, 1, -1: the first has left upwards, the last downwards.
    b = logs(0.5, 0.5, 0.5, 0.5)
    x = logs(0.65, 0.65, 0.35, 0.35)
    case = Case(x, x, x, b, row(1.0, -1.0, 1.0, -1.0), every(4))
    config = LossConfig(trust_region="proximal", behavior_mask=True)
    assert case.loss(config).kept.tolist() == [[False, True, True, False]]
    assert case.loss(config).loss.item() == pytest.approx((1.3 - 0.7) / 4)


def test_denominators_worked_out_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    token, sequence = LossConfig(), LossConfig(aggregation="sequence")
    constant = LossConfig(aggregation="constant", aggregation_length=8)
    assert [int(loss_denominator(mask, c)) for c in (token, sequence, constant)] == [4, 2, 16]
    assert token_shares(mask, sequence, torch.float64).flatten().tolist() == [1 / 3, 1.0, 1.0]
    assert token_shares(mask, constant).flatten().tolist() == [1.0, 1.0, 1.0]
    # A = 1, 2, 3 and 4 on policy: sequence means 2 and 4; the sum is 10.
    advantages = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    same = torch.full((3, 3), -1.0)
    case = Case(same, same, same, same, advantages, mask)
    for config, loss in ((token, -10 / 4), (sequence, -3.0), (constant, -10 / 16)):
        assert case.loss(config).loss.item() == pytest.approx(loss)


def test_m2po_worked_out_by_hand() -> None:
    # d = .1, .2, .4 move with their advantage, .9 against it; means of squares .01, .025, .07.
    # Under .04 the third goes; the one that moves back is not looked at.
    b = torch.full((1, 4), -2.0, dtype=torch.float64)
    d = row(0.1, -0.2, 0.4, 0.9)
    advantages = row(1.0, -1.0, 1.0, -1.0)
    inside = second_moment_set(d, advantages, every(4))
    assert inside.tolist() == [[True, True, True, False]]
    bound = second_moment_bound(d[inside], 0.04)
    assert bound.item() == pytest.approx(0.2)
    mask = within_second_moment(d, advantages, every(4), bound)
    assert mask.tolist() == [[True, True, False, True]]
    config = LossConfig(surrogate="unclipped", trust_region="behavior", second_moment_cap=0.04)
    case = Case(b + d, b + d, b + d, b, advantages, mask)
    loss = case.loss(config, num_tokens=4).loss.item()
    assert loss == pytest.approx(-(math.exp(0.1) - math.exp(-0.2) - math.exp(0.9)) / 4)


def test_loglinear_worked_out_by_hand() -> None:
    # b = -3, n = -1, f = .5: k = 0, 1, 3 give 0, 2/3 and 6/7 of the way of 2.
    b, n = torch.full((3,), -3.0), torch.full((3,), -1.0, requires_grad=True)
    lags = torch.tensor([0, 1, 3])
    x = loglinear_proximal(n, b, lags, 0.5)
    assert not x.requires_grad
    assert x.tolist() == pytest.approx([-3.0, -3 + 4 / 3, -3 + 12 / 7])
    assert torch.equal(loglinear_proximal(n, b, lags, 0.0), n.detach())
    # With x = -1: q = x, x, and a third of the way. From n alone: b + 2 / (k + f).
    assert loglinear_segment(n, b, lags).tolist() == pytest.approx([-1.0, -1.0, -3 + 2 / 3])
    q = loglinear_segment(x, b, lags)
    assert q.tolist() == pytest.approx([-3.0, -3 + 2 / 1.5, -3 + 2 / 3.5])


@pytest.mark.parametrize("centre", CENTRES)
def test_a_centre_changes_which_tokens_are_clipped(centre: str) -> None:
    # b = .2, q = .26, x = .28, n = .3: r = 1.5, 1.15, 1.07.
    case = Case(logs(0.3), logs(0.28), logs(0.26), logs(0.2), row(1.0), every(1))
    config = LossConfig(trust_region=centre)  # pyright: ignore[reportArgumentType]
    assert case.loss(config).clipped.item() is (centre == "behavior")
