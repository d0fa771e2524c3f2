"""Named rewards through checkpoints: other weights, other names, other numbers of ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.lightning.evaluation_loader import Evaluation
from sdp_lightning.lightning.train_loader import _common_names
from sdp_lightning.rollout.checkpoint.packed_groups import pack_groups
from sdp_lightning.rollout.checkpoint.resharding import reshard
from sdp_lightning.testing import FakeEngine
from support.checkpoints import content, finished, pending_in, through_a_file
from support.rollouts import rolling, wait_until

SETTINGS: dict[str, Any] = {"batch_size": 2, "max_head_lag": 1, "rows": 8, "num_epochs": 1}
ROWS = [{"id": f"row{i}", "prompt": "?"} for i in range(8)]


def length(completion: str, row: Any) -> float:
    return float(len(completion))


def one(completion: str, row: Any) -> float:
    return 1.0


def workflow_of(**weights: float) -> sdp.RLVRWorkflow:
    sampling = sdp.SamplingParams(max_new_tokens=4)
    rewards: Any = {name: length if name == "length" else one for name in weights}
    return sdp.RLVRWorkflow(
        rewards=rewards, reward_weights=weights, group_size=2, sampling=sampling
    )


def rolled(workflow: sdp.RolloutWorkflow) -> tuple[dict[str, Any], list[sdp.TrajectoryGroup]]:
    """The state of an executor with groups that are finished, and these groups."""
    with rolling(FakeEngine(), workflow, **SETTINGS | {"rows": ROWS}) as executor:
        wait_until(executor, lambda: executor.stat.pending == 4)
        return through_a_file(executor.state_dict()), finished(executor)


def restored(state: Mapping[str, Any], workflow: sdp.RolloutWorkflow) -> list[sdp.TrajectoryGroup]:
    settings = SETTINGS | {"rows": ROWS}
    with rolling(FakeEngine(), workflow, start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], 0, reset=True)
        return finished(executor)


def test_finished_groups_come_back_with_their_named_rewards() -> None:
    state, before = rolled(workflow_of(length=0.5, one=1.0))
    assert before[0].trajectories[0].reward == 0.5 * 4 + 1.0
    after = restored(state, workflow_of(length=0.5, one=1.0))
    assert [content(group) for group in after] == [content(group) for group in before]


def test_weights_may_change_on_resume() -> None:
    state, _ = rolled(workflow_of(length=0.5, one=1.0))
    for group in restored(state, workflow_of(one=10.0, length=-1.0)):
        for trajectory in group.trajectories:
            assert trajectory.rewards == {"length": 4.0, "one": 1.0}
            assert trajectory.reward == 6.0
            assert trajectory.reward_weights == {"one": 10.0, "length": -1.0}


def test_groups_without_the_names_of_now_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Those of a checkpoint from before rewards had names, too."""
    for former in (workflow_of(length=0.5, one=1.0), sdp.RLVRWorkflow(length, group_size=2)):
        state, before = rolled(former)
        caplog.clear()
        settings = SETTINGS | {"rows": ROWS}
        with (
            caplog.at_level(logging.WARNING),
            rolling(FakeEngine(), workflow_of(one=1.0), start=False, **settings) as executor,
        ):
            executor.load_state_dict(state)
            assert finished(executor) == []
            assert "4 finished groups of the checkpoint have other rewards than ['one']" in (
                caplog.text
            )
            executor.publish([], 0, reset=True)
            executor.resume()
            trained: list[str] = []
            while batch := executor.take():
                trained += [group.row_id for group in batch]
                assert all(t.rewards == {"one": 1.0} for g in batch for t in g.trajectories)
                executor.publish([], executor.version + 1)
        assert sorted(trained) == [row["id"] for row in ROWS]
        assert {group.row_id for group in before} == {f"row{i}" for i in range(4)}


def test_another_number_of_ranks_takes_them_over() -> None:
    state, before = rolled(workflow_of(length=0.5, one=1.0))
    for part in reshard([state], 2):
        for group in restored(part, workflow_of(length=0.5, one=1.0)):
            original = next(each for each in before if each.row_id == group.row_id)
            assert content(group)[3:] == content(original)[3:]
    assert sum(len(pending_in(part)) for part in reshard([state], 2)) == len(before) == 4


def test_a_checkpoint_from_before_rewards_had_names_is_read() -> None:
    state, before = rolled(sdp.RLVRWorkflow(length, group_size=2))
    old = {"pending": dict(state["pending"]), "running": pack_groups([])}
    for part in old.values():
        for name in ("num_named", "reward_names", "named_rewards"):
            del part[name]
    after = restored(state | old, sdp.RLVRWorkflow(length, group_size=2))
    assert [content(group) for group in after] == [content(group) for group in before]


def test_ranks_with_rewards_of_other_names_are_named() -> None:
    assert _common_names([None, ("row0", ("a",)), ("row1", ("a",))]) == ("a",)
    assert _common_names([None, None]) == ()
    with pytest.raises(sdp.RolloutError, match=r"row 'row1' of rank 1 has rewards named \['b'\]"):
        _common_names([("row0", ("a",)), ("row1", ("b",))])


def test_an_evaluation_has_the_mean_of_each() -> None:
    named = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}]
    found = Evaluation(version=3, groups=[[(0.7, named[0]), (0.3, named[1])], [(0.5, named[1])]])
    assert found.metrics == pytest.approx(
        {"reward": 0.5, "version": 3, "pass_at_k": 0, "reward/a": 1 / 3, "reward/b": 1 / 3}
    )
