"""The estimator: CONTRACT section 7, identities first."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, strategies as st

from sdp_lightning.config import LossConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import (
    PolicyLoss,
    complete_segment_logprobs,
    loss_denominator,
    segment_wise_ppo_loss,
)
from support.loss_cases import (
    CENTRES,
    FREE,
    SEEDS,
    Case,
    each_estimator,
    every_combination,
    few,
    reference,
    untimed,
)

torch.set_num_threads(1)


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


def test_segment_logprobs_are_not_read_by_estimators_that_do_not_need_them() -> None:
    case = Case.random(3)
    blank = dataclasses.replace(case, segment=torch.full_like(case.segment, math.nan))
    for centre in ("proximal", "behavior"):
        config = LossConfig(trust_region=centre)
        assert torch.equal(blank.gradient(config), case.gradient(config))


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
