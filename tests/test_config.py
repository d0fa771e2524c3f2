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
        (OptimizerConfig, {"lr": 0.0}, "lr must be positive"),
        (OptimizerConfig, {"schedule": "step"}, "schedule"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
        (OptimizerConfig, {"gradient_clip_val": 0.0}, "gradient_clip_val"),
        (OptimizerConfig, {"total_steps": 0}, "total_steps"),
        (UpdateConfig, {"num_minibatches": 0}, "num_minibatches"),
        (UpdateConfig, {"num_epochs": 0}, "num_epochs"),
        (UpdateConfig, {"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch"),
        (UpdateConfig, {"layout": "ragged"}, "layout"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_setting_out_of_range_is_refused(
    config: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**settings)
    assert isinstance(caught.value, SDPError) and isinstance(caught.value, ValueError)


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


def test_mini_batches_and_epochs_multiply_and_the_upper_epsilon_follows_the_lower() -> None:
    assert UpdateConfig(num_minibatches=2, num_epochs=3).steps_per_batch == 6
    assert LossConfig(clip_epsilon=0.1).upper_epsilon == 0.1
    assert LossConfig(clip_epsilon_high=0.3).upper_epsilon == 0.3


@pytest.mark.parametrize("name", ["timeout_s", "drain_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_is_a_time_that_a_thread_can_wait(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0 and at most 1e\\+09 s"):
        RolloutConfig(**{name: value})  # pyright: ignore[reportArgumentType]
