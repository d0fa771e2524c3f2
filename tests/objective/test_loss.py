"""The estimator: CONTRACT section 7, identities first."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import (
    PolicyLoss,
    complete_segment_logprobs,
    loss_denominator,
    segment_wise_ppo_loss,
)
from support.loss_cases import CENTRES, ESTIMATORS, FREE, Case, every_combination, reference

torch.set_num_threads(1)
untimed = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)
SEEDS = st.integers(0, 2**32 - 1)


each_estimator = pytest.mark.parametrize("config", ESTIMATORS.values(), ids=ESTIMATORS)


@each_estimator
@few
@given(seed=SEEDS)
def test_agrees_with_the_formula_token_by_token(config: LossConfig, seed: int) -> None:
    case = Case.random(seed)
    expected, result = reference(case, config), case.loss(config)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-12)
    assert torch.equal(result.kept, expected.kept)
    assert torch.allclose(case.gradient(config), expected.gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("surrogate", "least"), [("ppo", 1000), ("cispo", 50), ("unclipped", 500)])
def test_every_combination_agrees_with_the_formula_in_one_piece_and_in_two(
    surrogate: str, least: int
) -> None:
    case, combinations = Case.random(3), list(every_combination(surrogate))
    case.mask[1] = False
    case.mask[1, 2] = True  # rows of unlike lengths
    dirty = case.with_junk(math.inf)
    assert len(combinations) >= least
    for config in combinations:
        expected = reference(case, config)
        gradient = dirty.gradient(config)
        assert dirty.loss(config).loss.item() == pytest.approx(expected.loss, abs=1e-12), config
        assert torch.allclose(gradient, expected.gradient, atol=1e-14), config
        count = float(loss_denominator(case.mask, config))
        for rows in ([0], [2, 1]):
            part = dirty.rows(rows).gradient(config, count)
            assert torch.allclose(part, gradient[rows], atol=1e-14), config


@untimed
@given(seed=SEEDS)
def test_all_centres_telescope_to_the_same_gradient_without_bounds(seed: int) -> None:
    case = Case.random(seed, spread=1.0)
    weight = (case.target - case.behavior).exp()
    expected = torch.where(case.mask, -case.advantages * weight, 0.0) / case.mask.sum()
    for centre in CENTRES:
        config = dataclasses.replace(FREE, trust_region=centre)
        assert torch.allclose(case.gradient(config), expected, rtol=1e-10, atol=1e-14)


@untimed
@given(seed=SEEDS, exponent=st.floats(0, 1), cap=st.none() | st.floats(1, 3))
def test_segment_and_proximal_agree_when_every_lag_is_at_most_one(
    seed: int, exponent: float, cap: float | None
) -> None:
    case = Case.random(seed)
    case.segment = case.proximal
    segment = LossConfig(dual_clip=3.0, behavior_weight_floor=0.3)
    proximal = dataclasses.replace(
        segment, trust_region="proximal", bridge_exponent=exponent, bridge_cap=cap
    )
    assert torch.allclose(case.gradient(segment), case.gradient(proximal), atol=1e-14)
    assert case.loss(segment).loss.item() == pytest.approx(case.loss(proximal).loss.item())


@untimed
@given(seed=SEEDS)
def test_proximal_with_the_whole_bridge_is_decoupled_ppo(seed: int) -> None:
    case = Case.random(seed)
    config = LossConfig(trust_region="proximal", behavior_weight_cap=None)
    ratio = (case.target - case.proximal).exp()
    surrogate = torch.minimum(ratio * case.advantages, ratio.clamp(0.8, 1.2) * case.advantages)
    decoupled = -(case.proximal - case.behavior).exp() * surrogate
    expected = decoupled[case.mask].sum() / case.mask.sum()
    assert case.loss(config).loss.item() == pytest.approx(expected.item())


@untimed
@given(seed=SEEDS)
def test_proximal_without_the_bridge_is_the_origins_estimator(seed: int) -> None:
    case = Case.random(seed)
    config = LossConfig(trust_region="proximal", bridge_exponent=0.0, behavior_weight_cap=None)
    ratio = (case.target - case.proximal).exp()
    surrogate = torch.minimum(ratio * case.advantages, ratio.clamp(0.8, 1.2) * case.advantages)
    origin = -(case.segment - case.behavior).exp() * surrogate
    expected = origin[case.mask].sum() / case.mask.sum()
    assert case.loss(config).loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("centre", CENTRES)
@untimed
@given(seed=SEEDS)
def test_on_policy_the_gradient_is_that_of_reinforce(centre: str, seed: int) -> None:
    case = Case.random(seed)
    case.proximal = case.segment = case.behavior = case.target
    expected = torch.where(case.mask, -case.advantages, 0.0) / case.mask.sum()
    gradient = case.gradient(LossConfig(trust_region=centre))
    assert torch.allclose(gradient, expected, atol=1e-14)


@each_estimator
@few
@given(seed=SEEDS, junk=st.sampled_from([math.inf, -math.inf, math.nan, -200.0, 1e30]))
def test_junk_at_masked_positions_changes_nothing(
    config: LossConfig, seed: int, junk: float
) -> None:
    case = Case.random(seed)
    dirty = case.with_junk(junk)
    assert torch.equal(dirty.gradient(config), case.gradient(config))
    clean_loss, dirty_loss = case.loss(config), dirty.loss(config)
    for field in dataclasses.fields(PolicyLoss):
        assert torch.equal(getattr(dirty_loss, field.name), getattr(clean_loss, field.name))


@each_estimator
@few
@given(seed=SEEDS)
def test_splitting_into_microbatches_changes_nothing_when_all_divide_by_the_same_number(
    config: LossConfig, seed: int
) -> None:
    case = Case.random(seed, shape=(4, 5))
    whole = case.loss(config)
    parts = [[2], [0, 3], [1]]
    count = sum(float(loss_denominator(case.mask[rows], config)) for rows in parts)
    losses = [case.rows(rows).loss(config, count).loss for rows in parts]
    assert sum(losses).item() == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-13)
    gradient = case.gradient(config)
    for rows in parts:
        assert torch.allclose(case.rows(rows).gradient(config, count), gradient[rows], atol=1e-14)


@untimed
@given(seed=SEEDS)
def test_only_the_target_policy_gets_a_gradient(seed: int) -> None:
    case = Case.random(seed)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()[:5]]
    config = LossConfig(trust_region="proximal", bridge_exponent=0.5, behavior_weight_cap=None)
    result = segment_wise_ppo_loss(*leaves, case.mask, config=config, lags=case.lags)
    result.loss.backward()
    assert leaves[0].grad is not None
    assert [leaf.grad for leaf in leaves[1:]] == [None] * 4
    assert not result.log_weight.requires_grad and not result.log_ratio.requires_grad


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def logs(*values: float) -> Tensor:
    return row(*values).log()


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


def test_segment_logprobs_are_not_read_by_estimators_that_do_not_need_them() -> None:
    case = Case.random(3)
    blank = dataclasses.replace(case, segment=torch.full_like(case.segment, math.nan))
    for centre in ("proximal", "behavior"):
        config = LossConfig(trust_region=centre)
        assert torch.equal(blank.gradient(config), case.gradient(config))


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


def test_num_tokens_below_one_counts_as_one_and_a_negative_one_is_refused() -> None:
    case = Case.random(5)
    assert case.loss(LossConfig(), 0.0).loss.item() == case.loss(LossConfig(), 1.0).loss.item()
    with pytest.raises(ValueError, match=r"num_tokens must be finite and 0 or more, got -1"):
        case.loss(LossConfig(), -1.0)


def test_wrong_shapes_and_masks_are_refused() -> None:
    case = Case.random(5)
    with pytest.raises(ValueError, match=r"loss_mask must be boolean, got torch\.int64"):
        dataclasses.replace(case, mask=case.mask.long()).loss(LossConfig())
    with pytest.raises(ValueError, match=r"'advantages': \(3,\)"):
        dataclasses.replace(case, advantages=torch.ones(3)).loss(LossConfig())


@pytest.mark.parametrize(
    "setting",
    [
        {"dual_clip": 1.0},
        {"behavior_weight_cap": 1.0},
        {"behavior_weight_floor": 0.0},
        {"behavior_weight_floor": 1.0},
    ],
)
def test_settings_without_meaning_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LossConfig(**setting)


NAN = math.nan
COMPLETION = [
    ("behavior", [-1.0, -1.0, -3.0, -2.0, -2.0]),
    ("decoupled", [-1.0, -1.0, -3.0, -1.0, -1.0]),
    ("loglinear", [-1.0, -1.0, -3.0, -1.5, -1.75]),
]


@pytest.mark.parametrize(("missing", "expected"), COMPLETION)
def test_segment_logprobs_are_completed_by_lag_and_score(
    missing: str, expected: list[float]
) -> None:
    # Lags 0 and 1 take x even if something was scored; lag 3 has a score; lags 2 and 4 have none.
    completed = complete_segment_logprobs(
        torch.tensor([NAN, -9.0, -3.0, NAN, NAN]),
        torch.tensor([False, True, True, False, False]),
        torch.full((5,), -1.0),
        torch.full((5,), -2.0),
        torch.tensor([0, 1, 3, 2, 4]),
        missing,
    )
    assert completed.tolist() == expected


def test_completion_refuses_unscored_old_tokens_under_drop_and_only_those() -> None:
    two = torch.tensor([-1.0, -1.0])
    args = (two, torch.tensor([True, False]), two, two)
    with pytest.raises(ValueError, match="1 tokens of lag 2 or more"):
        complete_segment_logprobs(*args, torch.tensor([2, 2]), "drop")
    assert torch.equal(complete_segment_logprobs(*args, torch.tensor([2, 1]), "drop"), two)


@untimed
@given(seed=SEEDS)
def test_around_past_a_token_of_lag_one_is_trained_as_around_behavior_others_as_around_segment(
    seed: int,
) -> None:
    case = Case.random(seed, spread=0.2)
    around = {
        region: case.gradient(LossConfig(trust_region=region)) for region in ("segment", "behavior")
    }
    found = case.gradient(LossConfig(trust_region="past"))
    assert torch.equal(found, torch.where(case.lags == 1, around["behavior"], around["segment"]))


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


def test_around_past_a_call_without_lags_is_refused_with_the_remedy() -> None:
    *tensors, lags = Case.random(0).tensors()
    with pytest.raises(ValueError, match=r"trust_region='past'.*pass lags=, for example"):
        segment_wise_ppo_loss(*tensors, config=LossConfig(trust_region="past"))
    with pytest.raises(ValueError, match=r"'lags': \(2, 7\)"):
        segment_wise_ppo_loss(*tensors, config=LossConfig(), lags=lags[:2])


@untimed
@given(seed=SEEDS)
def test_loglinear_at_lag_one_is_the_proximal_policy(seed: int) -> None:
    case = Case.random(seed)
    lags = torch.ones_like(case.mask, dtype=torch.long)
    args = (case.segment, ~case.mask & case.mask, case.proximal, case.behavior, lags)
    assert torch.equal(complete_segment_logprobs(*args, "loglinear"), case.proximal)
