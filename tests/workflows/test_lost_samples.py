"""Samples that infrastructure errors cost their groups: left out, tried again, counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, InfrastructureError, RolloutError
from sdp_lightning.rewards import RewardPool
from sdp_lightning.rollout.groups.telemetry import RolloutCounts
from sdp_lightning.testing import FakeEngine
from sdp_lightning.training.batch import collate
from sdp_lightning.training.loss import row_advantages
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow
from support.checkpoints import through_a_file
from support.misbehaving_rewards import by_row
from support.rollouts import rolling, wait_until
from support.waiting import wait_for

ROWS = [{"id": f"r{i}", "prompt": "?"} for i in range(4)]
LENGTHS = {"r0": [1, 2, 3, 4]}
ONE_EPOCH = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}


class Judge:
    """The length of a completion; ``fails`` lists, of each length, how often it fails first."""

    def __init__(self, fails: Mapping[int, int], cause: str = "the judge timed out") -> None:
        self.left, self.cause, self.calls = dict(fails), cause, Counter[int]()

    def __call__(self, completion: str, row: Row) -> float:
        length = len(completion)
        self.calls[length] += 1
        if self.left.get(length, 0) > 0:
            self.left[length] -= 1
            raise InfrastructureError(self.cause)
        return float(length)


def engine_of_lengths(*lengths: int) -> FakeEngine:
    """Completions of a group, in the order of their requests, have these lengths."""
    rest: dict[int, int] = {}

    def reply(request: Any) -> int:
        return rest.setdefault(request.seed, lengths[len(rest) % len(lengths)])

    return FakeEngine(reply)


def workflow_of(reward: Any, group_size: int = 4) -> sdp.RLVRWorkflow:
    sampling = SamplingParams(max_new_tokens=8)
    return sdp.RLVRWorkflow(reward, group_size=group_size, sampling=sampling)


def test_a_lost_sample_is_in_neither_mean_nor_deviation_of_its_group(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge = Judge({2: 99})
    with rolling(engine_of_lengths(1, 2, 3, 5), workflow_of(judge), **ONE_EPOCH) as executor:
        [group] = executor.take() or []
        assert [t.reward for t in group.trajectories] == [1.0, 3.0, 5.0]
        assert judge.calls == {1: 1, 2: 1, 3: 1, 5: 1}, "enough are left: none is tried again"
        telemetry = executor.telemetry
        assert telemetry.errors == {"the judge timed out": 1} and telemetry.num_left_out == 1
        batch = collate([group], version=0)
    # The mean of 1, 3, 5 is 3, their standard deviation sqrt(8 / 3) = 1.63299.
    advantages = row_advantages(batch.rewards, batch.group_ids, sdp.UpdateConfig())
    assert advantages.tolist() == pytest.approx([-2 / 1.63299, 0.0, 2 / 1.63299], abs=1e-4)
    rloo = row_advantages(batch.rewards, batch.group_ids, sdp.UpdateConfig(advantages="rloo"))
    assert torch.equal(rloo, torch.tensor([-3.0, 0.0, 3.0]))
    assert caplog.text.count("for a sample of row 'r0': the judge timed out") == 1


def test_below_the_minimum_only_lost_samples_are_tried_again_and_nothing_is_sampled_twice() -> None:
    judge, engine = Judge({1: 1, 2: 1, 3: 2}), engine_of_lengths(1, 2, 3, 4)
    settings = ONE_EPOCH | {"min_group_size": 3, "lost_retries": 1}
    with rolling(engine, workflow_of(judge), **settings) as executor:
        [group] = executor.take() or []
        assert [t.reward for t in group.trajectories] == [1.0, 2.0, 4.0]
        assert judge.calls == {1: 2, 2: 2, 3: 2, 4: 1}
        assert engine.num_generated == 1 + 2 + 3 + 4
        assert executor.telemetry.errors == {"the judge timed out": 4}
        assert executor.telemetry.num_left_out == 1
        assert group.trajectories[0].segments[0].version == 0


def test_a_group_with_too_few_is_rejected_and_further_rows_fill_the_batch() -> None:
    def reward(completion: str, row: Row) -> float:
        if row["id"] in ("r0", "r2"):
            raise InfrastructureError("sandbox died" if row["id"] == "r0" else "")
        return 1.0

    settings: dict[str, Any] = {"rows": ROWS, "num_epochs": 1, "batch_size": 2}
    with rolling(FakeEngine(), workflow_of(reward, 2), lost_retries=2, **settings) as executor:
        assert [group.row_id for group in executor.take() or []] == ["r1", "r3"]
        wait_until(executor, lambda: executor.stat.rejected == 2)
        assert executor.stat.failed == 0
        assert executor.telemetry.errors == {"sandbox died": 6, "unknown": 6}
        assert executor.telemetry.num_left_out == 4
        counts = RolloutCounts.from_ledger(
            executor.stat, executor.telemetry, workflow={}, generated=0
        )
        metrics = counts.metrics()
    assert metrics["rollout/left_out"] == 4.0
    assert metrics["rollout/error/sandbox_died"] == metrics["rollout/error/unknown"] == 6.0


def test_infrastructure_that_is_gone_ends_the_run_with_its_causes() -> None:
    workflow = workflow_of(Judge({4: 10**6}), 2)
    settings: dict[str, Any] = {"max_rejected_in_a_row": 3, "max_concurrent": 1, "lost_retries": 0}
    with rolling(FakeEngine(), workflow, rows=ROWS, **settings) as executor:
        wanted = r"3 groups in a row .*errors left too few .*so far: 6 x the judge timed out\."
        with pytest.raises(RolloutError, match=wanted):
            executor.take()


def test_a_wrong_reward_is_still_an_error_that_names_its_row() -> None:
    def reward(completion: str, row: Row) -> float:
        return row["gold"]

    with (
        rolling(FakeEngine(), workflow_of(reward), **ONE_EPOCH) as executor,
        pytest.raises(RolloutError, match=r"row 'r0'.*KeyError: 'gold'"),
    ):
        executor.take()


def test_a_workflow_of_ones_own_that_raises_it_costs_the_group_only() -> None:
    class Own(RolloutWorkflow):
        @property
        def sampling(self) -> SamplingParams:
            return SamplingParams()

        async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
            if row["id"] == "r0":
                raise InfrastructureError("no simulator")
            return await workflow_of(lambda c, r: 1.0, 1).run(row, session)

    settings: dict[str, Any] = {"rows": ROWS[:2], "num_epochs": 1, "batch_size": 1}
    with rolling(FakeEngine(), Own(), **settings) as executor:
        assert [group.row_id for group in executor.take() or []] == ["r1"]
        wait_until(executor, lambda: executor.stat.rejected == 1)
        assert executor.telemetry.errors == {"no simulator": 1}


# Environments and tools ---------------------------------------------------------------------------


class Flaky(sdp.Environment):
    """Two turns; the first ``left`` second turns of all samples fail."""

    left, names = 0, 0

    def __init__(self) -> None:
        Flaky.names += 1
        self.turn, self.name = 0, Flaky.names

    def reset(self, row: Row) -> str:
        return "start"

    def step(self, completion: str) -> sdp.StepResult:
        self.turn += 1
        if self.turn == 2 and Flaky.left > 0:
            Flaky.left -= 1
            raise InfrastructureError("the simulator is gone")
        return sdp.StepResult(self.answer(), 1.0, self.turn == 2)

    def answer(self) -> str:
        return "go on"


class Named(Flaky):
    """It never answers the same, so a sample that is tried again begins anew."""

    def answer(self) -> str:
        return f"go on, {self.name}"


@pytest.mark.parametrize(("kind", "tokens"), [(Flaky, 8), (Named, 8 + 4)], ids=["same", "other"])
def test_a_conversation_is_tried_again_from_where_its_environment_failed(
    kind: type[Flaky], tokens: int
) -> None:
    """Two turns of 4 tokens; those before the error are sampled again only if they must be."""
    Flaky.left = 1
    workflow = sdp.MultiTurnWorkflow(
        kind,
        group_size=1,
        sampling=SamplingParams(max_new_tokens=8),
        turn_format="\n{observation}\n",
    )
    engine = FakeEngine(4)
    with rolling(engine, workflow, **ONE_EPOCH) as executor:
        [group] = executor.take() or []
        assert group.trajectories[0].reward == 2.0 and group.num_sampled == 8
        assert executor.telemetry.errors == {"the simulator is gone": 1}
        assert executor.telemetry.num_diverged == executor.telemetry.num_left_out == 0
    assert engine.num_generated == tokens + (4 if kind is Named else 0)


def test_a_tool_that_raises_it_is_not_told_to_the_policy() -> None:
    def search(text: str) -> str:
        """Search."""
        raise InfrastructureError("search is down")

    environment = sdp.ToolEnvironment([search], lambda c, r: 0.0)
    with pytest.raises(InfrastructureError, match="search is down"):
        environment.step('<tool_call>{"name": "search", "arguments": {"text": "x"}}</tool_call>')


# Checkpoints, evaluation, settings ----------------------------------------------------------------


def test_after_a_resume_a_lost_sample_is_scored_again_and_nothing_is_sampled_twice() -> None:
    """Lengths 1, which was lost before the checkpoint, and 4, of which no segment is closed."""
    settings = ONE_EPOCH | {"max_concurrent": 1, "min_group_size": 1}
    lengths: dict[int, int] = {}
    engine = FakeEngine(lambda r: lengths.setdefault(r.seed, 1 + 3 * len(lengths)), manual=True)
    judge = Judge({1: 1})
    with rolling(engine, workflow_of(judge, 2), **settings) as executor:
        engine.advance(2, awaiting=2)
        wait_for(lambda: judge.calls[1] == 1)
        state = through_a_file(executor.state_dict())
    engine = FakeEngine(2, manual=True)
    with rolling(engine, workflow_of(judge, 2), start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], 0, reset=True)
        executor.resume()
        engine.advance(2, awaiting=1)
        [group] = executor.take() or []
        assert [t.reward for t in group.trajectories] == [1.0, 2.0]
        assert engine.num_generated == 2 and executor.telemetry.num_diverged == 0
        assert executor.telemetry.errors == {}


def test_a_sample_that_is_lost_while_it_repeats_its_steps_makes_no_divergence() -> None:
    """Its environment fails at once after the resume, before any saved step."""

    class Gone(Flaky):
        def reset(self, row: Row) -> str:
            if Flaky.left > 0:
                Flaky.left -= 1
                raise InfrastructureError("the simulator is gone")
            return "start"

    settings = ONE_EPOCH | {"min_group_size": 1}
    workflow = sdp.MultiTurnWorkflow(
        Gone, group_size=2, sampling=SamplingParams(max_new_tokens=8), turn_format="{observation}"
    )
    engine = FakeEngine(4, manual=True)
    Flaky.left = 0
    with rolling(engine, workflow, **settings) as executor:
        engine.advance(4, awaiting=2)
        engine.wait_for_requests(2, total=4)
        state = through_a_file(executor.state_dict())
    Flaky.left = 1
    with rolling(FakeEngine(4), workflow, start=False, **settings) as executor:
        executor.load_state_dict(state)
        executor.publish([], 0, reset=True)
        executor.resume()
        [group] = executor.take() or []
        assert [t.reward for t in group.trajectories] == [1.0 + 1.0]
        assert (executor.telemetry.num_diverged, executor.telemetry.num_left_out) == (0, 1)


def test_an_evaluation_leaves_them_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    workflow = workflow_of(Judge({1: 99, 3: 99}, "judge"), 3)
    with (
        rolling(engine_of_lengths(1, 2, 3), workflow, start=False) as executor,
        caplog.at_level(logging.WARNING),
    ):
        executor.publish([], 0, reset=True)
        [group] = executor.evaluate(ROWS[:1], workflow)
        assert [t.reward for t in group.trajectories] == [2.0]
    assert "evaluation: 2 samples of 1 rows are left out" in caplog.text
    assert "2 x judge" in caplog.text


def test_a_pool_loses_samples_the_same_way() -> None:
    rows = [{"id": "r0", "prompt": "?", "way": "leave"}, {"id": "r1", "prompt": "?", "way": "good"}]
    with rolling(
        FakeEngine(),
        workflow := workflow_of(RewardPool(by_row, num_workers=2), 2),
        **(ONE_EPOCH | {"rows": rows, "lost_retries": 0}),
    ) as executor:
        assert [group.row_id for group in executor.take() or []] == ["r1"]
        wait_until(executor, lambda: executor.stat.rejected == 1)
        assert executor.telemetry.errors == {"a reward crashed": 2}
    workflow.close()


@pytest.mark.parametrize("setting", [{"min_group_size": 0}, {"lost_retries": -1}], ids=str)
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be an integer of at least"):
        sdp.RolloutConfig(**setting)  # pyright: ignore[reportArgumentType]
