"""Counts of groups: those of several ranks add up, and what is logged of the sum."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sdp_lightning.rewards.call_threads import CallLoad
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.rollout.groups.telemetry import RolloutCounts, RolloutTelemetry
from sdp_lightning.workflows.episode_log import EpisodeTimes


def counts_of_rank(rank: int) -> RolloutCounts:
    telemetry = RolloutTelemetry(
        num_overdue=1,
        trained_groups=2,
        trained_tokens=10,
        dropped_groups=3,
        dropped_tokens=30,
        num_left_out=1,
        errors={"A judge: timed out!": 2, "a judge  timed out": 3, "?": 1},
        num_diverged=1,
        num_discarded=3,
        timed_groups=4,
        group_s=8.0,
        times=EpisodeTimes(5, 10.0, 5.0, 2.5, 9),
    )
    stat = RolloutStat(running=1, pending=2, dropped=3, rejected=4, failed=5)
    workflow = {"reward_raised": 1 + rank, f"only_{rank}": 7}
    calls = CallLoad(running=3, waiting=7, lost=1)
    return RolloutCounts.from_ledger(stat, telemetry, workflow=workflow, generated=100, calls=calls)


def test_the_counts_of_ranks_add_up_name_by_name() -> None:
    total = sum((counts_of_rank(rank) for rank in range(2)), RolloutCounts())
    one = counts_of_rank(0)
    for field in fields(total):
        if field.name not in ("errors", "workflow", "times"):
            assert getattr(total, field.name) == 2 * getattr(one, field.name) > 0, field.name
    assert total.times == one.times + one.times
    assert total.errors == {name: 2 * count for name, count in one.errors.items()}
    assert total.workflow == {"reward_raised": 3, "only_0": 7, "only_1": 7}


def test_what_is_logged_are_counts_and_means() -> None:
    metrics = (counts_of_rank(0) + counts_of_rank(0)).metrics()
    assert metrics == pytest.approx(
        {
            "rollout/running": 2,
            "rollout/pending": 4,
            "rollout/rejected": 8,
            "rollout/failed": 10,
            "rollout/dropped_stale": 4,  # 2 * (3 dropped - 1 overdue)
            "rollout/dropped_overdue": 2,
            "rollout/left_out": 2,
            "rollout/error/a_judge_timed_out": 10,  # 2 * (2 + 3): one name of a metric
            "rollout/error/other": 2,  # a cause without a letter
            "rollout/diverged": 2,
            "rollout/cut_tokens": 18,
            "rollout/discarded": 6,
            "rollout/calls_running": 6,
            "rollout/calls_waiting": 14,
            "rollout/calls_lost": 2,
            "rollout/reward_raised": 2,
            "rollout/only_0": 14,
            "rollout/trained_length": 5.0,  # 10 tokens / 2 groups
            "rollout/dropped_length": 10.0,
            "rollout/length_ratio": 5.0 / 8.0,  # 40 tokens / 5 groups that ended
            "rollout_time/group_s": 2.0,
            "rollout_time/sample_s": 2.0,
            "rollout_time/tool_s": 1.0,
            "rollout_time/reward_s": 0.5,
        }
    )


def test_before_anything_has_ended_nothing_is_divided_by_zero() -> None:
    assert set(RolloutCounts().metrics().values()) == {0.0}
