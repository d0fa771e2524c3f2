"""The estimator family: reductions between its members, hand-worked numbers, finite differences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import (
    PolicyLoss,
    loglinear_proximal,
    loglinear_segment,
    loss_denominator,
    second_moment_bound,
    second_moment_set,
    within_second_moment,
)
from sdp_lightning.objective.aggregation import token_shares
from support.loss_cases import CENTRES, ESTIMATORS, FREE, Case

torch.set_num_threads(1)
untimed = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)  # of a seed, for each of many configs
SEEDS = st.integers(0, 2**32 - 1)
each_estimator = pytest.mark.parametrize("config", ESTIMATORS.values(), ids=ESTIMATORS)
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


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def logs(*values: float) -> Tensor:
    return row(*values).log()


def every(width: int) -> Tensor:
    return torch.ones(1, width, dtype=torch.bool)


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


# Numbers worked out by hand -----------------------------------------------------------------------


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


# M2PO ---------------------------------------------------------------------------------------------


@untimed
@given(
    drifts=st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.2, -0.5, 1.0, 3.0]), max_size=12),
    cap=st.sampled_from([0.001, 0.01, 0.04, 0.3, 20.0]),
)
def test_the_second_moment_bound_keeps_the_most_tokens_that_fit(
    drifts: list[float], cap: float
) -> None:
    values = torch.tensor(drifts, dtype=torch.float64)
    bound = float(second_moment_bound(values, cap))

    def moment(limit: float) -> float:
        kept = [d * d for d in drifts if abs(d) <= limit]
        return sum(kept) / len(kept) if kept else 0.0

    if not drifts:
        assert bound == math.inf
        return
    fitting = [abs(d) for d in drifts if moment(abs(d)) <= cap]
    assert bound == max(fitting, default=0.0)


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


@untimed
@given(seed=SEEDS, junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_m2po_does_not_look_at_masked_positions(seed: int, junk: float) -> None:
    case = Case.random(seed)
    dirty = case.with_junk(junk)
    sets = [second_moment_set(c.proximal - c.behavior, c.advantages, c.mask) for c in (case, dirty)]
    assert torch.equal(*sets)
    bound = second_moment_bound((case.proximal - case.behavior)[sets[0]], 0.1)
    left = [
        within_second_moment(c.proximal - c.behavior, c.advantages, c.mask, bound)
        for c in (case, dirty)
    ]
    assert torch.equal(*left)
    assert not (left[0] & ~case.mask).any()


# Log-linear policies ------------------------------------------------------------------------------


@untimed
@given(seed=SEEDS, share=st.floats(0, 0.99))
def test_loglinear_is_exact_where_log_probs_move_on_a_line(seed: int, share: float) -> None:
    case = Case.random(seed)
    generator = torch.Generator().manual_seed(seed)
    lags = torch.randint(0, 9, case.mask.shape, generator=generator)
    step = 0.1 * torch.randn(case.mask.shape, generator=generator, dtype=torch.float64)
    version = [case.behavior + k * step for k in range(11)]  # policies 0 .. 10 versions later

    def after(k: Tensor) -> Tensor:
        return torch.stack(version).gather(0, k[None])[0]

    proximal = after(lags)
    target = proximal + share * step
    expected = torch.where((lags == 0) & (torch.tensor(share) == 0), target, proximal)
    found = loglinear_proximal(target, case.behavior, lags, share)
    assert torch.allclose(found, expected, atol=1e-12)
    first_after = torch.where(lags == 0, proximal, after(lags.clamp(max=1)))
    assert torch.allclose(loglinear_segment(proximal, case.behavior, lags), first_after)
    assert torch.allclose(loglinear_segment(found, case.behavior, lags), first_after)


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


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_share_outside_the_step_is_refused(share: float) -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=r"share_done must be in \[0, 1\), got"):
        loglinear_proximal(zero, zero, zero.long(), share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loglinear_policies_are_at_least_float32(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=dtype)
    lags = torch.ones(1, dtype=torch.long)
    expected = torch.promote_types(dtype, torch.float32)
    assert loglinear_proximal(zero, zero, lags, 0.5).dtype == expected
    assert loglinear_segment(zero, zero, lags).dtype == expected


@pytest.mark.parametrize("centre", CENTRES)
def test_a_centre_changes_which_tokens_are_clipped(centre: str) -> None:
    # b = .2, q = .26, x = .28, n = .3: r = 1.5, 1.15, 1.07.
    case = Case(logs(0.3), logs(0.28), logs(0.26), logs(0.2), row(1.0), every(1))
    config = LossConfig(trust_region=centre)  # pyright: ignore[reportArgumentType]
    assert case.loss(config).clipped.item() is (centre == "behavior")
