"""What metrics say in words."""

from __future__ import annotations

import logging

import pytest

from sdp_lightning.training.metrics import all_names
from sdp_lightning.training.metrics.health import (
    LEAST_TOKENS,
    HealthLog,
    HealthWarning,
    health_warnings,
)
from sdp_lightning.training.metrics.names import LAG_NAMES, logged_names

WELL: dict[str, float] = {
    **{name: 0.0 for name in all_names()},
    **{f"lag/tokens_{lag}": 1000.0 for lag in LAG_NAMES},
    **{f"ess/token_{lag}": 0.9 for lag in LAG_NAMES},
}
# What is wrong, the kind of the warning, what it says and what it names as a remedy.
CASES = [
    ({"ess/token_2": 0.25, "ess/token_4plus": 0.12}, "low_ess", "lag 4+ is 0.12", "max_head_lag"),
    ({"ess/token_1": 0.29}, "low_ess", "lag 1 is 0.29", "max_concurrent"),
    ({"bridge/abs_log_mean_3": 0.4}, "large_bridge", "lag 3 is 0.40", "bridge_exponent=1"),
    ({"mismatch/abs_log_mean": 0.2}, "engine_mismatch", "0.200 nats", "weight_check_every"),
    ({"loss/rejected_fraction": 0.5}, "many_rejected", "50% of the tokens", "behavior_weight_cap"),
    ({"loss/clip_fraction": 0.6}, "many_clipped", "60% of the ratios", "lower lr"),
    (
        {"train/truncated": 0.6, "train/masked_truncated": 3.0},
        *("many_masked", "60% of the trajectories", "max_new_tokens"),
    ),
    ({"drift/clamped_share": 0.01}, "clamped", "1.00% of the tokens", "top_p"),
]


@pytest.mark.parametrize(("wrong", "kind", "found", "remedy"), CASES)
def test_a_verdict_names_what_was_found_and_the_remedy(
    wrong: dict[str, float], kind: str, found: str, remedy: str
) -> None:
    (warning,) = health_warnings(WELL | wrong, leaves_bridge_out=True)
    assert warning.kind == kind
    assert found in warning.text
    assert remedy.lower() in warning.text.lower()


@pytest.mark.parametrize(
    "metrics",
    [
        WELL,
        {},
        dict.fromkeys(all_names(), 0.0),
        WELL | {"ess/token_1": 0.3, "mismatch/abs_log_mean": 0.05, "loss/rejected_fraction": 0.2},
        WELL | {"ess/token_1": 0.0, "lag/tokens_1": LEAST_TOKENS - 1.0},
        WELL | {"mismatch/abs_log_mean": 1.0, "lag/tokens_0": LEAST_TOKENS - 1.0},
    ],
    ids=["well", "nothing", "no tokens", "at the bounds", "few", "few of lag 0"],
)
def test_there_is_no_verdict_where_nothing_is_known_to_be_wrong(metrics: dict[str, float]) -> None:
    assert health_warnings(metrics, leaves_bridge_out=True) == []


def test_a_bridge_that_is_taken_whole_may_be_large() -> None:
    assert health_warnings(WELL | {"bridge/abs_log_mean_4plus": 2.0}) == []


def test_every_kind_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = HealthLog()
    with caplog.at_level(logging.WARNING):
        log.warn(WELL)
        for _ in range(3):
            log.warn(WELL | {"ess/token_1": 0.1})
        log.warn(WELL | {"ess/token_3": 0.2, "loss/clip_fraction": 0.9})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "lag 1 is 0.10" in said[0] and "90% of the ratios" in said[1]


def test_judged_names_are_logged_names() -> None:
    for wrong, *_ in CASES:
        assert wrong.keys() <= logged_names().keys()


def test_warnings_compare_by_what_they_say() -> None:
    assert health_warnings(WELL | {"loss/clip_fraction": 0.5}) == [
        HealthWarning(
            "many_clipped",
            "50% of the ratios are clipped (most 40%): these tokens have no gradient. Lower "
            "lr, num_epochs or num_minibatches, or raise clip_epsilon.",
        )
    ]
