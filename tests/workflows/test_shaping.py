"""Filters leave groups out, exactly and never for ever; penalties shape rewards: in training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from jsonargparse import ArgumentParser

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, SamplingParams, Segment, Trajectory
from sdp_lightning.workflows import (
    AllEqual,
    AllRight,
    AllWrong,
    GroupFilter,
    LengthPenalty,
    LinearLength,
    SoftOverlong,
    Truncated,
)
from support.rollouts import DEADLINE_S, assert_conserved, rolling, wait_until
from support.trainers import Recorder, make_data, make_module, make_trainer

RIGHT, WRONG = "every reward of the group is 1 or more", "every reward of the group is 0 or less"


def by_row(completion: str, row: Mapping[str, Any]) -> float:
    """Rows are right, wrong, or mixed by the length of the completion."""
    return {"right": 1.0, "wrong": 0.0}.get(row["kind"], float(len(completion) == 1))


def make(
    filters: Sequence[GroupFilter] = (), penalties: Sequence[LengthPenalty] = ()
) -> sdp.ShapedWorkflow:
    sampling = SamplingParams(max_new_tokens=4)
    inner = sdp.RLVRWorkflow(by_row, group_size=2, sampling=sampling)
    return sdp.ShapedWorkflow(inner, filters=filters, penalties=penalties)


def kinds(*names: str) -> list[dict[str, Any]]:
    return [{"id": f"{i}-{k}", "prompt": "?", "kind": k} for i, k in enumerate(names)]


class OneLongOneShort(FakeEngine):
    """Two samples of a row: 1 token and 3, whatever their seeds."""

    def __init__(self) -> None:
        super().__init__(self.reply_for)
        self.seen: dict[str, int] = {}

    def reply_for(self, request: Any) -> int:
        number = self.seen[request.group_key] = self.seen.get(request.group_key, 0) + 1
        return 1 if number % 2 else 3


# Filters ------------------------------------------------------------------------------------------


def test_batches_are_refilled_with_groups_that_pass_and_the_others_are_counted_by_reason() -> None:
    rows = kinds(*["mixed", "right", "wrong", "right"] * 6)
    settings: dict[str, Any] = {"rows": rows, "num_epochs": 1, "batch_size": 2, "max_head_lag": 9}
    engine = OneLongOneShort()
    with rolling(engine, make([AllRight(), AllWrong()]), **settings) as executor:
        batches = [executor.take() for _ in range(3)]
        assert [len(batch or ()) for batch in batches] == [2, 2, 2]
        assert all(g.row_id.endswith("mixed") for batch in batches for g in batch or ())
        assert executor.take() is None
        assert (executor.stat.rejected, executor.stat.consumed) == (18, 6)
        assert executor.telemetry.rejections == {RIGHT: 12, WRONG: 6}


def test_a_rejected_group_takes_no_capacity() -> None:
    """(H + c + 1) * B = 4 may be accepted; the 4 that were rejected before count for nothing."""
    rows = kinds("right", "right", "wrong", "right", *["mixed"] * 9)
    settings: dict[str, Any] = {"rows": rows, "batch_size": 2, "max_head_lag": 1}
    workflow = make([AllEqual()])
    with rolling(OneLongOneShort(), workflow, **settings) as executor:
        wait_until(executor, lambda: executor.stat.pending == 4)
        stat = executor.stat
        assert (stat.rejected, stat.accepted, stat.running) == (4, 4, 0)
        assert executor.manager.capacity(0) == 0 and executor.manager.capacity(1) == 2
        assert_conserved(executor)


def test_filters_that_let_nothing_pass_end_the_run_and_name_the_reason() -> None:
    settings: dict[str, Any] = {"rows": kinds(*["right"] * 5), "max_rejected_in_a_row": 20}
    workflow = make([AllWrong(), AllRight()])
    with (
        rolling(FakeEngine(), workflow, **settings) as executor,
        pytest.raises(RolloutError, match=rf"20 groups in a row were rejected.*{re.escape(RIGHT)}"),
    ):
        executor.take()


def trajectories(*rewards: float) -> list[Trajectory]:
    return [Trajectory((Context([1]), Segment(0, [2], [-1.0])), reward=r) for r in rewards]


@pytest.mark.parametrize(
    ("judge", "rewards", "is_left_out"),
    [
        (AllRight(), (1.0, 1.0), True),
        (AllRight(), (1.0, 0.9), False),
        (AllRight(0.9), (1.0, 0.9), True),
        (AllWrong(), (0.0, 0.0), True),
        (AllWrong(), (0.0, 0.1), False),
        (AllWrong(0.1), (0.0, 0.1), True),
        (AllEqual(), (0.3, 0.3), True),
        (AllEqual(), (0.3, 0.4), False),
        (AllEqual(0.2), (0.3, 0.4), True),
        (AllEqual(), (0.3,), True),
    ],
    ids=str,
)
def test_what_a_filter_leaves_out(
    judge: GroupFilter, rewards: tuple[float, ...], is_left_out: bool
) -> None:
    assert bool(judge.why_not(trajectories(*rewards))) == is_left_out


# Penalties ----------------------------------------------------------------------------------------


def of_length(num_tokens: int, *, cut: bool = False) -> Trajectory:
    segment = Segment(0, [2] * num_tokens, [-1.0] * num_tokens)
    parts = (Context([1] * 50), segment)
    return Trajectory(parts, reward=1.0, finish_reason="length" if cut else "stop")


@pytest.mark.parametrize(
    ("penalty", "num_tokens", "expected"),
    [
        (SoftOverlong(20, 4), 16, 0.0),  # L - b = 16: the last length that is free
        (SoftOverlong(20, 4), 17, -0.25),
        (SoftOverlong(20, 4), 19, -0.75),
        (SoftOverlong(20, 4), 20, -1.0),
        (SoftOverlong(20, 4), 90, -1.0),
        (SoftOverlong(20, 4, scale=0.5), 18, -0.25),
        (LinearLength(0.01), 30, -0.3),
        (LinearLength(0.01, free_tokens=10), 30, -0.2),
        (LinearLength(0.01, free_tokens=10), 5, 0.0),
        (LinearLength(0.01, at_most=0.1), 30, -0.1),
        (Truncated(), 9, 0.0),
    ],
    ids=str,
)
def test_what_a_length_costs(penalty: LengthPenalty, num_tokens: int, expected: float) -> None:
    """Sampled tokens alone: the prompt has 50."""
    assert penalty.of(of_length(num_tokens)) == pytest.approx(expected)


def test_a_trajectory_that_was_cut_off_may_cost() -> None:
    assert Truncated(0.5).of(of_length(9, cut=True)) == -0.5


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 200), st.integers(1, 200))
def test_longer_never_costs_less(size: int, extra: int, one: int, other: int) -> None:
    penalty = SoftOverlong(size + extra, size)
    short, long = sorted((one, other))
    assert -1.0 <= penalty.of(of_length(long)) <= penalty.of(of_length(short)) <= 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftOverlong(4, 5), "needs 1 <= buffer <= max_tokens.*buffer=5, max_tokens=4"),
        (lambda: SoftOverlong(4, 0), "buffer=0"),
        (lambda: SoftOverlong(4, 2, scale=0), "scale=0"),
        (lambda: LinearLength(0), "needs per_token > 0"),
        (lambda: LinearLength(1, free_tokens=-1), "free_tokens >= 0; got 1, 1.0 and -1"),
        (lambda: LinearLength(1, at_most=0), "at_most > 0"),
    ],
)
def test_settings_are_validated(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# Together -----------------------------------------------------------------------------------------


def test_filters_judge_the_task_s_own_rewards_and_evaluation_sees_neither() -> None:
    workflow = make([AllRight()], [LinearLength(0.1), Truncated(0.25)])
    settings: dict[str, Any] = {"rows": kinds("right", "mixed"), "num_epochs": 1, "batch_size": 1}
    with rolling(OneLongOneShort(), workflow, **settings) as executor:
        [group] = executor.take() or []
        assert group.row_id == "1-mixed"
        assert [t.reward for t in group.trajectories] == pytest.approx([1 - 0.1, 0 - 0.3])
        judged = executor.evaluate(kinds("right"), workflow, timeout_s=DEADLINE_S)
        assert [[t.reward for t in g.trajectories] for g in judged] == [[1.0, 1.0]]
        assert executor.telemetry.rejections == {RIGHT: 1}


def test_a_shaped_workflow_samples_counts_and_closes_as_the_one_inside() -> None:
    closed: list[str] = []

    class Inner(sdp.RLVRWorkflow):
        @property
        def counts(self) -> Mapping[str, int]:
            return {"reward_raised": 3}

        def close(self) -> None:
            closed.append("inner")

    inner = Inner(by_row, sampling=SamplingParams(max_new_tokens=7))
    workflow = sdp.ShapedWorkflow(inner)
    assert workflow.sampling.max_new_tokens == 7 and workflow.counts == {"reward_raised": 3}
    workflow.close()
    assert closed == ["inner"]


def test_a_config_puts_the_pieces_together() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=sdp.RolloutWorkflow)
    place = "sdp_lightning.workflows"
    inner = {
        "class_path": "sdp_lightning.RLVRWorkflow",
        "init_args": {"reward": f"{__file__}:by_row"},
    }
    overlong = {"class_path": f"{place}.SoftOverlong", "init_args": {"max_tokens": 9, "buffer": 2}}
    init: dict[str, Any] = {
        "workflow": inner,
        "filters": [{"class_path": f"{place}.AllRight"}, {"class_path": f"{place}.AllWrong"}],
        "penalties": [overlong],
    }
    config = {"class_path": "sdp_lightning.ShapedWorkflow", "init_args": init}
    workflow = parser.instantiate(parser.parse_object({"workflow": config})).workflow
    assert workflow.filters == (AllRight(), AllWrong())
    assert workflow.penalties == (SoftOverlong(9, 2),)


def test_fit_trains_on_whole_batches_of_groups_that_pass(model_folder: str) -> None:
    rows = kinds(*["mixed", "right", "wrong"] * 4)
    data = make_data(make([AllEqual()]), rows=rows, engine=OneLongOneShort())
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=3)
    trainer.fit(make_module(model_folder), data)
    assert len(recorder.steps) == 3
    for step in recorder.steps:
        assert len(step.groups) == 2 and all(name.endswith("mixed") for name in step.row_ids)
    assert recorder.metrics[-1]["rollout/rejected"] > 0


def several(*values: tuple[float, float]) -> list[Trajectory]:
    bare = Trajectory((Context([1]), Segment(0, [3, 4, 5], [-1.0] * 3)))
    weights = {"correct": 1.0, "form": 0.5}
    return [bare.with_rewards(dict(zip(weights, each, strict=True)), weights) for each in values]


def test_filters_look_at_the_sum_of_several_rewards_or_at_the_one_that_is_named() -> None:
    group = several((1.0, 0.0), (1.0, 1.0))
    assert AllRight(1.0).why_not(group) and AllRight(1.0, "correct").why_not(group)
    assert not AllRight(1.0, "form").why_not(group)
    assert AllWrong(0.0, "form").why_not(several((1.0, 0.0))) == (
        "every reward 'form' of the group is 0 or less"
    )
    assert AllEqual().why_not(several((1.0, 0.0), (0.5, 1.0))) == "", "sums are equal, parts not"
    assert AllEqual().why_not(several((1.0, 0.5), (1.0, 0.5)))
    with pytest.raises(RolloutError, match=r"no reward named 'speed'.*\['correct', 'form'\]"):
        AllRight(1.0, "speed").why_not(group)


def both(completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {"correct": 1.0, "penalty" if row["kind"] == "clash" else "form": 1.0}


def test_penalties_are_one_more_of_several_rewards() -> None:
    inner = sdp.RLVRWorkflow(both, group_size=2, reward_weights={"correct": 1.0, "form": 0.5})
    shaped = sdp.ShapedWorkflow(inner, penalties=[LinearLength(0.25)])
    assert shaped.reward_weights == {"correct": 1.0, "form": 0.5, "penalty": 1.0}
    with rolling(OneLongOneShort(), shaped, rows=kinds("right"), batch_size=1) as executor:
        [group] = executor.take() or []
    assert [t.rewards["penalty"] for t in group.trajectories] == [-0.25, -0.75]
    assert [t.reward for t in group.trajectories] == [1.25, 0.75]
    with pytest.raises(ConfigError, match="a reward is named 'penalty'"):
        sdp.ShapedWorkflow(sdp.RLVRWorkflow(rewards={"penalty": by_row}), penalties=[Truncated()])
    shaped = sdp.ShapedWorkflow(sdp.RLVRWorkflow(both, group_size=1), penalties=[Truncated()])
    with (
        rolling(FakeEngine(), shaped, rows=kinds("clash"), batch_size=1) as executor,
        pytest.raises(RolloutError, match=r"row '0-clash'.*a reward is named 'penalty'"),
    ):
        executor.take()
