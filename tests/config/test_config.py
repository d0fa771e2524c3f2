"""Settings refuse values out of range, with the value, and survive a pickle."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from sdp_lightning.config import LossConfig, OptimizerConfig, RolloutConfig, UpdateConfig
from sdp_lightning.errors import ConfigError, SDPError


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (RolloutConfig, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (RolloutConfig, {"batch_size": True}, "got True"),
        (RolloutConfig, {"max_head_lag": -1}, "max_head_lag must be .* at least 0, got -1"),
        (RolloutConfig, {"max_concurrent": 0}, "max_concurrent"),
        (RolloutConfig, {"max_failures": -1}, "max_failures"),
        (RolloutConfig, {"max_rejected_in_a_row": 0}, "max_rejected_in_a_row"),
        (RolloutConfig, {"num_epochs": 0}, "num_epochs"),
        (RolloutConfig, {"missing_proximal": "zero"}, "one of behavior, .*; got 'zero'"),
        (RolloutConfig, {"on_overdue": "ignore"}, "one of drop, wait, mask; got 'ignore'"),
        (RolloutConfig, {"timeout_s": 0}, "timeout_s must be above 0"),
        (RolloutConfig, {"drain_s": float("nan")}, "drain_s must be above 0"),
        (LossConfig, {"clip_epsilon": 1.0}, "clip_epsilon"),
        (LossConfig, {"clip_epsilon_high": 0.0}, "clip_epsilon_high"),
        (LossConfig, {"dual_clip": 1.0}, "dual_clip must be above 1"),
        (LossConfig, {"behavior_weight_cap": 1.0}, "behavior_weight_cap must be above 1"),
        (LossConfig, {"behavior_weight_floor": 1.0}, "behavior_weight_floor"),
        (LossConfig, {"rejection_on": "both"}, "rejection_on"),
        (LossConfig, {"trust_region": "none"}, "trust_region"),
        (LossConfig, {"trust_region": "proximal", "bridge_exponent": 1.5}, "bridge_exponent"),
        (LossConfig, {"trust_region": "proximal", "bridge_cap": 0.5}, "bridge_cap"),
        (LossConfig, {"bridge_exponent": 0.0}, "act only with trust_region='proximal'"),
        (LossConfig, {"trust_region": "behavior", "rejection_on": "weight"}, "reject nothing"),
        (LossConfig, {"surrogate": "trpo"}, "one of ppo, cispo, unclipped; got 'trpo'"),
        (LossConfig, {"ratio_level": "row"}, "ratio_level"),
        (LossConfig, {"correction": "drop"}, "correction must be one of mask, truncate"),
        (LossConfig, {"rejection_level": "row"}, "rejection_level"),
        (LossConfig, {"aggregation": "mean"}, "aggregation"),
        (LossConfig, {"proximal": "zero"}, "proximal must be one of recompute, loglinear"),
        (LossConfig, {"segment_proximal": "zero"}, "segment_proximal"),
        (LossConfig, {"kl_estimator": "k4"}, "kl_estimator"),
        (LossConfig, {"kl_in": "both"}, "kl_in"),
        (LossConfig, {"kl_tokens": "some"}, "kl_tokens must be one of kept, all; got 'some'"),
        (LossConfig, {"kl_coefficient": -0.1}, "kl_coefficient must be .* got -0.1"),
        (LossConfig, {"kl_coefficient": float("inf")}, "kl_coefficient must be finite"),
        (LossConfig, {"second_moment_cap": 0.0}, "second_moment_cap must be positive"),
        (LossConfig, {"aggregation_length": 0}, "aggregation_length must be an integer"),
        (OptimizerConfig, {"lr": 0.0}, "lr must be positive"),
        (OptimizerConfig, {"lr": float("inf")}, "lr must be .*finite, got inf"),
        (OptimizerConfig, {"weight_decay": float("nan")}, "weight_decay .*got nan"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay .*got -0.1"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"betas .*got \(0.9, 1.0\)"),
        (OptimizerConfig, {"schedule": "step"}, "schedule"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
        (OptimizerConfig, {"gradient_clip_val": 0.0}, "gradient_clip_val"),
        (OptimizerConfig, {"total_steps": 0}, "total_steps"),
        (UpdateConfig, {"num_minibatches": 0}, "num_minibatches"),
        (UpdateConfig, {"num_epochs": 0}, "num_epochs"),
        (UpdateConfig, {"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch"),
        (UpdateConfig, {"layout": "ragged"}, "layout"),
        (UpdateConfig, {"group_std": "batch"}, "one of population, sample; got 'batch'"),
        (UpdateConfig, {"group_std": "sample", "advantages": "rloo"}, "'rloo'.* has no effect"),
        (UpdateConfig, {"group_std": "sample", "scale_advantages_by_std": False}, "no effect"),
        (UpdateConfig, {"mask_truncated": "yes"}, "mask_truncated must be true or false"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_setting_out_of_range_is_refused(
    config: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**settings)
    assert isinstance(caught.value, SDPError) and isinstance(caught.value, ValueError)


CISPO = {"surrogate": "cispo", "trust_region": "behavior"}
FREE = {"surrogate": "unclipped", "trust_region": "behavior"}
TRUNCATED = {"trust_region": "proximal", "rejection_on": "weight", "correction": "truncate"}
M2PO = FREE | {"second_moment_cap": 0.04}
MASKED = {"trust_region": "proximal", "behavior_mask": True}
GSPO = {"ratio_level": "sequence"}


@pytest.mark.parametrize(
    ("settings", "two", "why"),
    [
        (CISPO | {"dual_clip": 3.0}, ("cispo", "dual_clip=3.0"), "bounds its weight already"),
        (FREE | {"dual_clip": 3.0}, ("unclipped", "dual_clip=3.0"), "has no bound"),
        (CISPO | TRUNCATED, ("cispo", "truncate"), "once more"),
        ({"surrogate": "cispo"}, ("cispo", "trust_region='segment'"), "no centre changes"),
        (CISPO | {"trust_region": "proximal"}, ("cispo", "'proximal'"), "would do nothing"),
        ({"surrogate": "unclipped"}, ("unclipped", "'segment'"), "around every centre"),
        (
            {"surrogate": "unclipped", "rejection_on": "weight", "behavior_weight_cap": None},
            ("unclipped", "'segment'"),
            "without a bound on the weight",
        ),
        (FREE | {"clip_epsilon_high": 0.3}, ("unclipped", "clip_epsilon_high=0.3"), "by nothing"),
        (
            GSPO | {"trust_region": "proximal", "bridge_exponent": 0.5},
            ("ratio_level='sequence'", "bridge_exponent=0.5"),
            "averages them first",
        ),
        ({"correction": "truncate"}, ("truncate", "rejection_on='drift'"), "another number"),
        (
            TRUNCATED | {"rejection_level": "sequence"},
            ("truncate", "rejection_level='sequence'"),
            "rejects nothing",
        ),
        (TRUNCATED | {"bridge_cap": 2.0}, ("truncate", "bridge_cap=2.0"), "cut twice"),
        (
            {"rejection_level": "geometric", "behavior_weight_cap": None},
            ("rejection_level='geometric'", "behavior_weight_cap"),
            "both are None",
        ),
        (M2PO | {"surrogate": "ppo"}, ("second_moment_cap=0.04", "'ppo'"), "in place of the clip"),
        (M2PO | {"surrogate": "cispo"}, ("second_moment_cap", "'cispo'"), "the same tokens"),
        (M2PO | {"proximal": "loglinear"}, ("second_moment_cap", "loglinear"), "saves the forward"),
        (M2PO | MASKED, ("second_moment_cap", "behavior_mask"), "the same side"),
        (M2PO | TRUNCATED, ("second_moment_cap", "truncate"), "by their weight"),
        (M2PO | GSPO, ("second_moment_cap", "ratio_level"), "its mean would change"),
        (M2PO | {"aggregation": "sequence"}, ("second_moment_cap", "aggregation"), "mean would"),
        (M2PO | {"rejection_level": "sequence"}, ("second_moment_cap", "rejection_level"), "mean"),
        (
            {"trust_region": "behavior", "behavior_mask": True},
            ("behavior_mask", "trust_region='behavior'"),
            "mask twice",
        ),
        ({"behavior_mask": True}, ("behavior_mask", "trust_region='segment'"), "mask twice"),
        (MASKED | GSPO, ("behavior_mask", "ratio_level='sequence'"), "whole sequences"),
        ({"aggregation": "constant"}, ("constant", "aggregation_length"), "set aggregation_length"),
        ({"aggregation_length": 9}, ("aggregation_length=9", "'token'"), "read only with"),
        (
            {"segment_proximal": "loglinear", "trust_region": "behavior"},
            ("segment_proximal='loglinear'", "'behavior'"),
            "does not read",
        ),
        (
            {"segment_proximal": "loglinear", "trust_region": "proximal"},
            ("segment_proximal='loglinear'", "'proximal'"),
            "does not read",
        ),
        (
            {"kl_coefficient": 0.1, "kl_estimator": "k1"},
            ("kl_estimator='k1'", "kl_in='loss'"),
            "mean 0",
        ),
        (
            {"kl_estimator": "weighted_k3", "kl_in": "reward"},
            ("kl_estimator='weighted_k3'", "kl_in='reward'"),
            "of b itself",
        ),
        (
            {"kl_tokens": "all", "kl_in": "reward"},
            ("kl_tokens='all'", "kl_in='reward'"),
            "always takes all",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_that_contradict_each_other_are_refused_with_the_two_and_the_reason(
    settings: dict[str, Any], two: tuple[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        LossConfig(**settings)
    assert all(name in str(caught.value) for name in two)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(CISPO | {"behavior_weight_cap": None}, id="CISPO"),
        pytest.param(FREE, id="importance weights alone"),
        pytest.param(TRUNCATED, id="TIS"),
        pytest.param(TRUNCATED | {"surrogate": "unclipped"}, id="TIS without a clip"),
        pytest.param(TRUNCATED | {"bridge_exponent": 0.0}, id="the origin's, truncated"),
        pytest.param(
            {"surrogate": "unclipped", "rejection_on": "weight"}, id="unclipped, weight masked"
        ),
        pytest.param(M2PO, id="M2PO"),
        pytest.param(M2PO | {"behavior_weight_cap": None}, id="M2PO alone"),
        pytest.param(MASKED, id="decoupled weights under a behavior-centred mask"),
        pytest.param(MASKED | {"surrogate": "unclipped", "clip_epsilon_high": 0.3}, id="no clip"),
        pytest.param(GSPO | {"aggregation": "sequence"}, id="GSPO"),
        pytest.param(GSPO | {"trust_region": "behavior", "dual_clip": 2.0}, id="GSPO, dual clip"),
        pytest.param({"rejection_level": "geometric"}, id="sequence mask"),
        pytest.param({"aggregation": "constant", "aggregation_length": 9}, id="Dr. GRPO"),
        pytest.param({"segment_proximal": "loglinear", "proximal": "loglinear"}, id="loglinear"),
        pytest.param({"kl_coefficient": 0.1, "kl_estimator": "k1", "kl_in": "reward"}, id="k1"),
        pytest.param({"kl_estimator": "k1"}, id="k1 of weight 0"),
        pytest.param(
            {"kl_coefficient": 0.1, "kl_estimator": "weighted_k3", "kl_tokens": "all"},
            id="DeepSeek-V3.2's KL",
        ),
    ],
)
def test_published_combinations_are_accepted(settings: dict[str, Any]) -> None:
    assert LossConfig(**settings).needs_reference == ("kl_coefficient" in settings)


@pytest.mark.parametrize("config", [RolloutConfig, LossConfig, OptimizerConfig, UpdateConfig])
def test_settings_survive_a_pickle(config: Any) -> None:
    assert pickle.loads(pickle.dumps(config())) == config()


def test_concurrency_is_the_staleness_bound_unless_set() -> None:
    """Fault: `x or default` where x may be 0."""
    assert RolloutConfig(batch_size=8, max_head_lag=2).concurrency == 24
    assert RolloutConfig(batch_size=8, max_head_lag=0).concurrency == 8
    assert RolloutConfig(batch_size=8, max_concurrent=1).concurrency == 1


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        pytest.param({}, True, id="segment reads q"),
        pytest.param({"trust_region": "past"}, True, id="and so does past"),
        pytest.param({"trust_region": "behavior"}, False, id="behavior does not"),
        pytest.param({"trust_region": "proximal"}, False, id="nor proximal with the whole bridge"),
        pytest.param({"trust_region": "proximal", "bridge_exponent": 0.5}, True, id="an exponent"),
        pytest.param({"trust_region": "proximal", "bridge_cap": 2.0}, True, id="a cap"),
    ],
)
def test_segments_are_scored_only_for_estimators_that_read_the_score(
    settings: dict[str, Any], needed: bool
) -> None:
    assert LossConfig(**settings).needs_segment_proximal is needed
    assert LossConfig(**settings).needs_segment_scores is needed
    if needed:
        loglinear = LossConfig(**settings, segment_proximal="loglinear")
        assert loglinear.needs_segment_proximal and not loglinear.needs_segment_scores


def test_mini_batches_and_epochs_multiply_and_the_upper_epsilon_follows_the_lower() -> None:
    assert UpdateConfig(num_minibatches=2, num_epochs=3).steps_per_batch == 6
    assert LossConfig(clip_epsilon=0.1).upper_epsilon == 0.1
    assert LossConfig(clip_epsilon_high=0.3).upper_epsilon == 0.3


@pytest.mark.parametrize("name", ["timeout_s", "drain_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_is_a_time_that_a_thread_can_wait(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0 and at most 1e\\+09 s"):
        RolloutConfig(**{name: value})  # pyright: ignore[reportArgumentType]
