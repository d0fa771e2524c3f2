"""Where the time of a run went, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sdp_lightning.lightning.phase_timer import PHASES
from sdp_lightning.observability.report.advice import advice_on
from sdp_lightning.observability.report.files import RunConfigs
from sdp_lightning.observability.report.time_breakdown import (
    reward_share,
    speeds_by_concurrency,
    time_breakdown,
    wait_parts,
)

SECONDS = st.floats(0, 1e6, allow_subnormal=False)


def make_row(version: int = 1, **seconds: float) -> dict[str, float]:
    """A step of 10 s, of which 7 are training, unless it is told otherwise."""
    times = {"step": 10.0, "wait": 0.0, "train": 7.0, "sampling": 10.0} | seconds
    return {"rollout/version": float(version)} | {f"time/{n}_s": s for n, s in times.items()}


def make_rows(count: int = 30, more: dict[str, float] | None = None, **seconds: float) -> Any:
    return [make_row(version + 1, **seconds) | (more or {}) for version in range(count)]


# The breakdown ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    spent=st.lists(st.tuples(*[SECONDS] * (len(PHASES) + 2)), min_size=1, max_size=5),
    took=st.tuples(SECONDS, SECONDS, SECONDS),
)
def test_the_breakdown_closes_and_nothing_is_negative(spent: Any, took: Any) -> None:
    rows = [
        {f"time/{phase}_s": s for phase, s in zip((*PHASES, "sampling"), seconds, strict=False)}
        | {"time/step_s": sum(seconds[: len(PHASES)]) + seconds[-1]}
        | {
            f"rollout_time/{n}_s": s
            for n, s in zip(("sample", "tool", "reward"), took, strict=True)
        }
        for seconds in spent
    ]
    breakdown = time_breakdown(rows)
    if breakdown is None:
        assert all(row["time/step_s"] == 0 for row in rows)
        return
    assert sum(breakdown.phases.values()) == pytest.approx(breakdown.total_s)
    assert min(breakdown.phases.values()) >= -1e-9 * breakdown.total_s
    assert 0 <= breakdown.floor_share <= 1 and 0 <= breakdown.sampling_share <= 1


def test_the_floor_is_the_longer_side_and_what_is_exposed() -> None:
    # max(6 sampling, 2 + 3 scoring and training) + 1 publishing = 7 of 10 s
    breakdown = time_breakdown(make_rows(4, sampling=6.0, score=2.0, train=3.0, publish=1.0))
    assert breakdown is not None
    assert breakdown.floor_s == pytest.approx(4 * 7.0)
    assert breakdown.floor_share == pytest.approx(0.7)
    # the trainer's side is the longer one: 2 + 5 + 1
    breakdown = time_breakdown(make_rows(4, sampling=6.0, score=2.0, train=5.0, publish=1.0))
    assert breakdown is not None and breakdown.floor_share == pytest.approx(0.8)


def test_sampling_for_an_evaluation_is_not_sampling_for_training() -> None:
    breakdown = time_breakdown([make_row(sampling=9.0, train=3.0, evaluate=5.0)])
    assert breakdown is not None
    assert breakdown.floor_s == pytest.approx(4.0 + 5.0)  # max(9 - 5, 3) + 5


def tried_rows(*settings: tuple[int, int, float]) -> list[dict[str, float]]:
    """Steps of 10 s: (groups at once, steps, tokens a second)."""
    return [
        make_row(sampling=9.0, wait=5.0, train=4.0)
        | {"rollout/concurrency": float(at_once), "speed/train_tokens_per_s": speed}
        for at_once, count, speed in settings
        for _ in range(count)
    ]


def test_a_run_does_not_reach_its_floor_by_sampling_slowly() -> None:
    """8 steps at 50 tokens/s hold 4,000 tokens: 40 s at the 100 tokens/s that 4 at once reach."""
    rows = tried_rows((4, 5, 100.0), (2, 8, 50.0))
    rows[5]["speed/train_tokens_per_s"] = 400.0  # a first step: its groups ran 4 at once
    assert speeds_by_concurrency(rows) == {2: pytest.approx(50.0), 4: pytest.approx(100.0)}
    rows[5]["speed/train_tokens_per_s"] = 50.0
    alone = time_breakdown(rows[5:])
    assert alone is not None and alone.speeds == {2: pytest.approx(50.0)}
    assert alone.floor_share == pytest.approx(0.9), "nobody knows what another setting reaches"
    both = time_breakdown(rows)
    assert both is not None
    # 5 * 10 * 100 + 8 * 10 * 50 tokens at 100 tokens/s
    assert both.floor_s == pytest.approx(90.0) and both.floor_share == pytest.approx(9 / 13)


def test_which_setting_would_be_faster_is_said_with_numbers() -> None:
    slow = told(tried_rows((4, 20, 100.0), (2, 20, 50.0)))
    assert "max_concurrent=4 would train 100% more tokens a second than 2" in slow["concurrency"]
    fast = told(tried_rows((4, 20, 97.0), (2, 20, 50.0), (4, 20, 98.0)))
    assert "ended at 4 groups at once, the fastest that it tried" in fast["concurrency"]
    assert "concurrency" not in told(tried_rows((4, 40, 100.0)))
    assert "near_floor" not in told(tried_rows((4, 40, 100.0))), "one setting shows no floor"
    waits = told(tried_rows((4, 40, 1.0)), setting("rollout", max_concurrent="auto"))
    assert "max_concurrent='auto' tries how many" in waits["trainer_waits"]


def test_a_wait_is_divided_as_the_rollouts_time_is() -> None:
    row = {"rollout_time/sample_s": 3.0, "rollout_time/tool_s": 0.0, "rollout_time/reward_s": 1.0}
    assert wait_parts(row) == {"wait for samples": 0.75, "wait for rewards": 0.25}
    assert reward_share(row) == 0.25
    assert wait_parts({}) == {"wait for samples": 1.0}
    breakdown = time_breakdown([make_row(wait=2.0) | row])
    assert breakdown is not None
    assert breakdown.phases["wait for rewards"] == pytest.approx(0.5)
    assert breakdown.wait_s == 2.0


def test_phases_that_are_longer_than_the_step_leave_no_rest() -> None:
    breakdown = time_breakdown([make_row(step=1.0, train=2.0)])
    assert breakdown is not None
    assert breakdown.total_s == 2.0 and breakdown.phases["the rest"] == 0.0


# The advice -----------------------------------------------------------------------------------

SETTINGS = {
    "rollout": {"max_head_lag": 2, "max_concurrent": 8, "batch_size": 4},
    "loss": {"proximal": "recompute", "bridge_exponent": 1.0},
    "update": {"num_minibatches": 1, "num_epochs": 1},
}


def setting(part: str, **changes: Any) -> dict[str, Any]:
    return SETTINGS | {part: {**SETTINGS[part], **changes}}


def told(rows: Any, options: dict[str, Any] = SETTINGS) -> dict[str, str]:
    return {advice.kind: advice.text for advice in advice_on(rows, RunConfigs.read(options))}


@pytest.mark.parametrize(
    ("kind", "rows", "options", "words"),
    [
        (
            "trainer_waits",
            make_rows(wait=4.1, train=5.0, more={"rollout/running": 8.0}),
            SETTINGS,
            "waits 41% of the time for rollouts, and the engine samples 100% of it. All of "
            "max_concurrent=8 groups run: raise it if the engine has memory left, or add a replica",
        ),
        (
            "trainer_waits",
            make_rows(wait=4.1, train=5.0, more={"rollout/running": 3.0}),
            SETTINGS,
            "Only 3 of max_concurrent=8 groups run in the mean: the bound on staleness holds",
        ),
        (
            "trainer_waits",
            make_rows(
                wait=4.1,
                more={"rollout_time/sample_s": 1.0, "rollout_time/reward_s": 1.0},
            ),
            SETTINGS,
            "Rewards are 50% of a rollout",
        ),
        ("trainer_waits", make_rows(wait=4.1), {}, "Raise max_concurrent or add a replica"),
        (
            "in_turn",
            make_rows(wait=5.0, train=5.0, sampling=5.0),
            setting("rollout", max_head_lag=0),
            "max_head_lag=0 allows no overlap, and steps take 2.0 times the floor",
        ),
        (
            "trainer_bound",
            make_rows(train=9.0),
            setting("update", num_minibatches=2),
            "waits 0% of the time, and 90% is forward and backward. With 2 optimizer steps a batch",
        ),
        ("trainer_bound", make_rows(train=9.0), SETTINGS, "A larger micro-batch"),
        (
            "old_tokens",
            make_rows(train=9.0, more={"lag/mean": 1.9}),
            SETTINGS,
            "1.9 versions old in the mean, of at most 2",
        ),
        ("gaps", make_rows(wait=4.0, train=5.0, sampling=5.0), SETTINGS, "reach 50% of the floor"),
        ("near_floor", make_rows(train=9.5), SETTINGS, "at 100% of the floor"),
        ("much_weights", make_rows(publish=2.0), SETTINGS, "20% of the time is publishing weights"),
        ("much_scoring", make_rows(score=2.0), SETTINGS, "20% of the time is scoring"),
        ("much_evaluating", make_rows(evaluate=2.0), SETTINGS, "20% of the time is evaluating"),
        ("much_rest", make_rows(train=7.0), SETTINGS, "30% of the time is in no phase"),
        (
            "many_dropped",
            make_rows(
                more={
                    "rollout/dropped_stale": 20.0,
                    "rollout/dropped_overdue": 10.0,
                    "rollout/trained_length": 100.0,
                    "rollout/dropped_length": 300.0,
                }
            ),
            SETTINGS,
            # 30 of 30 * 4 consumed and 30 dropped
            "20% of the groups were dropped as too old (20 while they waited, 10 while they ran). "
            "Dropped ones had 300 tokens",
        ),
        ("many_rejected", make_rows(more={"rollout/rejected": 50.0}), SETTINGS, "50 groups were"),
        ("many_failed", make_rows(more={"rollout/failed": 50.0}), SETTINGS, "it raised"),
        ("flat_reward", make_rows(more={"train/reward": 0.0}), SETTINGS, "was 0 in each of the"),
        ("skipped", make_rows(more={"train/skipped": 0.5}), SETTINGS, "50.0% of the optimizer"),
        ("uniform", make_rows(more={"train/uniform": 0.8}), SETTINGS, "In 80% of the groups all"),
        (
            "truncated",
            make_rows(more={"train/truncated": 0.4}),
            SETTINGS,
            "40% of the trajectories",
        ),
        (
            "low_ess",
            make_rows(more={"ess/token_1": 0.1, "lag/tokens_1": 500.0}),
            SETTINGS,
            "effective sample size at lag 1 is 0.10",
        ),
        (
            "large_bridge",
            make_rows(more={"bridge/abs_log_mean_2": 0.5, "lag/tokens_2": 500.0}),
            setting("loss", trust_region="proximal", bridge_exponent=0.0),
            "bridge at lag 2",
        ),
        (
            "large_bridge",
            make_rows(more={"bridge/abs_log_mean_2": 0.5, "lag/tokens_2": 500.0}),
            setting("loss", trust_region="proximal", bridge_cap=2.0),
            "this estimator does not take it whole",
        ),
        (
            "trainer_waits",
            make_rows(wait=4.1, train=5.0, more={"rollout/running": 3.0}),
            setting("rollout", max_concurrent=None),  # (max_head_lag + 1) * batch_size
            "Only 3 of max_concurrent=12 groups run",
        ),
        ("too_short", make_rows(3), SETTINGS, "3 steps are too few"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_wrong_is_said_with_numbers(
    kind: str, rows: Any, options: dict[str, Any], words: str
) -> None:
    assert words in told(rows, options)[kind]


def test_of_a_healthy_run_only_good_is_said() -> None:
    rows = make_rows(
        wait=0.8, train=8.5, publish=0.5, more={"lag/mean": 0.9, "ess/token_1": 0.97} | {}
    )
    for index, row in enumerate(rows):
        row["train/reward"] = index / 30
    assert list(told(rows)) == ["near_floor"]


def test_a_lag_that_few_batches_have_is_judged_by_its_tokens_alone() -> None:
    """A metric of a lag is 0 where a batch has no token of it, which is no low share."""
    rows = make_rows(more={"ess/token_2": 0.0, "lag/tokens_2": 0.0})
    rows[-1] |= {"ess/token_2": 0.9, "lag/tokens_2": 5000.0}
    assert "low_ess" not in told(rows)
    rows[-1]["ess/token_2"] = 0.1
    assert "effective sample size at lag 2 is 0.10" in told(rows)["low_ess"]


def test_what_costs_most_comes_first_and_praise_last() -> None:
    rows = make_rows(train=9.0, more={"lag/mean": 1.9, "train/skipped": 0.5})
    tones = [advice.tone for advice in advice_on(rows, RunConfigs.read(SETTINGS))]
    assert tones == sorted(tones, key=["bad", "hint", "good"].index)
    assert tones[0] == "bad" and tones[-1] == "good"


def test_the_start_of_a_run_does_not_decide_what_is_said() -> None:
    rows = [*make_rows(10, wait=9.0, train=1.0), *make_rows(20, train=9.5)]
    assert "trainer_bound" in told(rows) and "trainer_waits" not in told(rows)
