"""The estimator family: reductions between its members, and finite differences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import PolicyLoss, loss_denominator
from support.loss_cases import ESTIMATORS, FREE, SEEDS, Case, each_estimator, few, untimed

torch.set_num_threads(1)
# A sequence ratio is refused with a bent bridge and with a behavior mask.
BY_SEQUENCE = {k: c for k, c in ESTIMATORS.items() if not (c.bends_bridge or c.behavior_mask)}
REJECTING = {
    k: c
    for k, c in ESTIMATORS.items()
    if c.correction == "mask" and (c.has_bounds or c.behavior_mask)
}


def but(config: LossConfig, **changes: Any) -> LossConfig:
    return dataclasses.replace(config, **changes)


def assert_same(left: PolicyLoss, right: PolicyLoss) -> None:
    for field in dataclasses.fields(PolicyLoss):
        mine, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.allclose(mine.double(), other.double(), rtol=1e-9, atol=1e-13), field.name


def assert_same_estimate(case: Case, left: LossConfig, right: LossConfig) -> None:
    assert_same(case.loss(left), case.loss(right))
    assert torch.allclose(case.gradient(left), case.gradient(right), rtol=1e-9, atol=1e-13)


# Reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@untimed
@given(seed=SEEDS)
def test_unclipped_telescopes_to_the_whole_importance_weight_around_every_centre(
    level: str, seed: int
) -> None:
    case = Case.random(seed)
    plain = LossConfig(surrogate="unclipped", trust_region="behavior", behavior_weight_cap=None)
    plain = but(plain, ratio_level=level)
    # Elsewhere the centre matters only by a bound on the weight: one that is never reached.
    bound: dict[str, Any] = {"rejection_on": "weight", "behavior_weight_cap": 1e30}
    for centre in ("segment", "proximal"):
        other = but(plain, trust_region=centre, correction="truncate", **bound)
        assert case.loss(other).loss.item() == pytest.approx(case.loss(plain).loss.item())
        assert torch.allclose(case.gradient(other), case.gradient(plain), rtol=1e-9, atol=1e-14)
    log_weight = case.target - case.behavior
    if level == "sequence":
        per_row = torch.where(case.mask, log_weight, 0.0).sum(1, True) / case.mask.sum(1, True)
        log_weight = per_row.expand_as(log_weight)
    expected = torch.where(case.mask, -case.advantages * log_weight.exp(), 0.0) / case.mask.sum()
    assert torch.allclose(case.gradient(plain), expected, rtol=1e-9, atol=1e-14)


@untimed
@given(seed=SEEDS)
def test_unclipped_is_ppo_whose_range_is_never_left(seed: int) -> None:
    case = Case.random(seed)
    unclipped = but(FREE, clip_epsilon_high=None, surrogate="unclipped", trust_region="behavior")
    assert_same_estimate(case, but(FREE, trust_region="behavior"), unclipped)


@pytest.mark.parametrize("centre", ["segment", "proximal"])
@untimed
@given(seed=SEEDS)
def test_truncation_without_bounds_is_a_mask_without_bounds(centre: str, seed: int) -> None:
    mask = LossConfig(trust_region=centre, rejection_on="weight", behavior_weight_cap=None)  # pyright: ignore[reportArgumentType]
    assert_same_estimate(Case.random(seed), mask, but(mask, correction="truncate"))


@pytest.mark.parametrize("settings", [{}, {"behavior_weight_floor": 0.6}], ids=["cap", "both"])
@untimed
@given(seed=SEEDS)
def test_truncation_differs_from_a_mask_only_in_tokens_outside_the_bounds(
    settings: dict[str, float], seed: int
) -> None:
    case = Case.random(seed)
    mask = LossConfig(
        trust_region="proximal", rejection_on="weight", behavior_weight_cap=1.4, **settings
    )
    truncated = but(mask, correction="truncate")
    kept = case.loss(mask).kept
    inside = torch.where(kept, case.gradient(truncated), 0.0)
    assert torch.allclose(inside, case.gradient(mask), atol=1e-14)
    result = case.loss(truncated)
    assert torch.equal(result.kept, case.mask)
    edges = result.log_weight[case.mask & ~kept].exp()
    limits = torch.tensor([1.4, settings.get("behavior_weight_floor", 1.4)], dtype=edges.dtype)
    assert torch.isclose(edges[:, None], limits).any(1).all()


@pytest.mark.parametrize("config", BY_SEQUENCE.values(), ids=BY_SEQUENCE)
@few
@given(seed=SEEDS)
def test_a_sequence_of_one_token_is_a_token(config: LossConfig, seed: int) -> None:
    case = Case.random(seed, shape=(6, 1))
    token = but(config, ratio_level="token", aggregation="token", aggregation_length=None)
    assert_same_estimate(case, token, but(token, ratio_level="sequence"))
    assert_same_estimate(case, token, but(token, aggregation="sequence"))
    assert_same_estimate(case, token, but(token, aggregation="constant", aggregation_length=1))
    if token.correction == "mask" and token.has_bounds:
        assert_same_estimate(case, token, but(token, rejection_level="sequence"))
        assert_same_estimate(case, token, but(token, rejection_level="geometric"))


@untimed
@given(seed=SEEDS)
def test_a_sequence_ratio_of_equal_tokens_is_the_ratio_of_each(seed: int) -> None:
    case = Case.random(seed, shape=(5, 1))
    wide = Case(*(tensor.expand(5, 4).clone() for tensor in case.tensors()))
    token = LossConfig(clip_epsilon=0.1)
    assert_same_estimate(wide, token, but(token, ratio_level="sequence"))


@untimed
@given(seed=SEEDS)
def test_gspo_has_the_gradient_of_the_clipped_sequence_ratio_itself(seed: int) -> None:
    case = Case.random(seed)
    case.advantages = case.advantages[:, :1].expand_as(case.advantages)  # one for the sequence
    target = case.target.clone().requires_grad_()
    tokens = case.mask.sum(1).clamp(min=1)
    ratio = (torch.where(case.mask, target - case.behavior, 0.0).sum(1) / tokens).exp()
    advantage = case.advantages[:, 0]
    worst = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
    objective = -(worst * case.mask.any(1)).sum() / case.mask.any(1).sum()
    expected = torch.autograd.grad(objective, target)[0]
    config = ESTIMATORS["GSPO"]
    assert case.loss(config).loss.item() == pytest.approx(objective.item())
    assert torch.allclose(case.gradient(config), expected, atol=1e-14)


@untimed
@given(seed=SEEDS)
def test_cispo_has_the_gradient_of_unclipped_where_its_clamp_does_not_act(seed: int) -> None:
    case = Case.random(seed)
    cispo = LossConfig(surrogate="cispo", trust_region="behavior", behavior_weight_cap=None)
    unclipped = but(cispo, surrogate="unclipped")
    clamped = case.loss(cispo).clipped
    assert torch.equal(clamped, case.mask & ((case.target - case.behavior).exp() > 1.2))
    mine, other = case.gradient(cispo), case.gradient(unclipped)
    assert torch.allclose(mine[~clamped], other[~clamped], atol=1e-14)
    at_most = torch.where(case.mask, -1.2 * case.advantages, 0.0) / case.mask.sum()
    assert torch.allclose(mine[clamped], at_most[clamped], atol=1e-14)


@untimed
@given(seed=SEEDS)
def test_the_behavior_mask_is_the_behavior_region_as_long_as_the_policy_has_not_moved(
    seed: int,
) -> None:
    # At n = x both leave the same tokens without a gradient, and weigh the others by exp(x - b).
    case = Case.random(seed)
    case.target = case.proximal
    masked = LossConfig(trust_region="proximal", behavior_mask=True, behavior_weight_cap=None)
    behavior = LossConfig(trust_region="behavior", behavior_weight_cap=None)
    assert torch.allclose(case.gradient(masked), case.gradient(behavior), atol=1e-14)


@untimed
@given(seed=SEEDS)
def test_aggregations_are_reweightings_of_one_another(seed: int) -> None:
    case = Case.random(seed)
    token = LossConfig(behavior_weight_cap=1.5)
    by_token = case.gradient(token) * case.mask.sum()
    rows = case.mask.any(1).sum()
    by_sequence = case.gradient(but(token, aggregation="sequence"))
    expected = by_token / case.mask.sum(1, True).clamp(min=1) / rows
    assert torch.allclose(by_sequence, expected, atol=1e-14)
    constant = case.gradient(but(token, aggregation="constant", aggregation_length=20))
    assert torch.allclose(constant, by_token / (20 * rows), atol=1e-14)
    full = case.but(mask=torch.ones_like(case.mask))  # equal lengths: all three agree
    assert_same_estimate(full, token, but(token, aggregation="sequence"))
    assert_same_estimate(full, token, but(token, aggregation="constant", aggregation_length=7))


@each_estimator
@untimed
@given(seed=SEEDS)
def test_a_row_without_tokens_counts_for_nothing(config: LossConfig, seed: int) -> None:
    case = Case.random(seed, shape=(3, 4))
    empty = Case.random(seed + 1, shape=(1, 4)).with_junk(math.nan)
    empty.mask = torch.zeros_like(empty.mask)
    longer = Case(
        *(torch.cat([a, b]) for a, b in zip(case.tensors(), empty.tensors(), strict=True))
    )
    assert longer.loss(config).loss.item() == pytest.approx(case.loss(config).loss.item())
    assert loss_denominator(longer.mask, config) == loss_denominator(case.mask, config)


@pytest.mark.parametrize("config", REJECTING.values(), ids=REJECTING)
def test_everything_rejected_is_zero_with_a_graph(config: LossConfig) -> None:
    # x, q and n are all 60 nats above b.
    near, far = torch.full((2, 3), -1.0), torch.full((2, 3), -61.0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    case = Case(near, near, near, far, torch.ones(2, 3), mask)
    result = case.loss(config)
    assert not result.kept.any() and result.loss.item() == 0.0
    assert torch.equal(case.gradient(config), torch.zeros(2, 3))


@each_estimator
def test_everything_masked_is_zero_with_a_graph(config: LossConfig) -> None:
    nan, inf = torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)
    case = Case(nan, nan, nan, inf, inf, torch.zeros(2, 3, dtype=torch.bool))
    assert not case.loss(config).kept.any() and case.loss(config).loss.item() == 0.0
    assert torch.equal(case.gradient(config), torch.zeros(2, 3))


# Finite differences -------------------------------------------------------------------------------


@each_estimator
def test_gradient_matches_finite_differences(config: LossConfig) -> None:
    case = Case.random(11, spread=0.3)
    if config.ratio_level == "sequence":
        # GSPO-token's gradient is that of its value for one advantage in each row.
        case.advantages = case.advantages[:, :1].expand_as(case.advantages).contiguous()
    if config.surrogate == "cispo":
        # Its weight is not followed. So L = sum(dL/dn * n), and differences see what the gradient
        # says where the clamp holds every weight still.
        by_hand = (case.gradient(config) * case.target).sum()
        assert case.loss(config).loss.item() == pytest.approx(by_hand.item())
        case.target = case.behavior + 2.0

    def loss(target: Tensor) -> Tensor:
        return case.but(target=target).loss(config).loss

    assert case.gradient(config).any()
    assert torch.autograd.gradcheck(loss, case.target.clone().requires_grad_())
