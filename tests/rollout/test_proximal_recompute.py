"""CONTRACT section 6: the right segments are scored, each once, in the one step that can."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import RolloutError
from sdp_lightning.rollout.proximal_recompute import RecomputeReport
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, Trajectory, TrajectoryGroup
from support.rollouts import (
    DEADLINE_S,
    Room,
    Samples,
    VersionScorer,
    make_executor,
    make_segment,
    rolling,
)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "still in flight"])
def test_segments_of_the_version_before_are_scored_and_no_others(finished: bool) -> None:
    room = Room(5)
    older, wanted, own = make_segment(3), make_segment(4, 3), make_segment(5)
    room.add([older, wanted, own], finished=finished)
    assert room.run() == RecomputeReport(num_segments=1, num_tokens=3)
    assert wanted.proximal.version == 5 and wanted.proximal.logprobs is not None
    assert wanted.proximal.logprobs.tolist() == [-5.0] * 3
    assert not older.proximal.is_set and not own.proximal.is_set


def test_all_members_in_every_place_go_to_the_scorer_in_one_call_each_once() -> None:
    """Faults: only row 0 of a group looked at; recomputation wired to nothing."""
    room = Room(5)
    segments = [make_segment(4) for _ in range(6)]
    room.add([segments[0]], [segments[1]])  # queued
    room.add([segments[2]], [Context([9]), segments[3], Context([9]), segments[4]], finished=False)
    room.add([], [segments[5]], finished=False)  # one member has nothing yet
    assert room.run() == RecomputeReport(6, 12)
    assert len(room.scorer.calls) == 1 and len(room.scorer.calls[0]) == 5
    assert all(s.proximal.version == 5 for s in segments)
    assert room.run() == RecomputeReport() and len(room.scorer.calls) == 1


def test_the_scorer_gets_everything_up_to_the_last_wanted_segment() -> None:
    room = Room(5)
    parts = [make_segment(3), Context([7]), make_segment(4), make_segment(5), Context([8])]
    room.add(parts, finished=False)
    room.run()
    (trajectory,) = room.scorer.calls[0]
    assert trajectory.parts[1:] == tuple(parts[:3])


def test_the_batch_in_the_trainers_hands_is_left_out() -> None:
    room = Room(5)
    taken, left = make_segment(4), make_segment(4)
    room.add([taken])
    room.registry.take()
    room.add([left])
    assert room.run().num_segments == 1
    assert left.proximal.is_set and not taken.proximal.is_set


@pytest.mark.parametrize(
    ("mask", "finished", "num"),
    [
        pytest.param(False, True, 0, id="waiting, the next commit purges it"),
        pytest.param(False, False, 0, id="running, the next commit cancels it"),
        pytest.param(True, True, 1, id="masked, it may still be trained"),
    ],
)
def test_groups_that_are_lost_anyway_are_not_scored(mask: bool, finished: bool, num: int) -> None:
    room = Room(5, max_head_lag=2, mask=mask)
    room.add([make_segment(3), make_segment(4)], finished=finished)
    assert room.run().num_segments == num


@pytest.mark.parametrize("H", [0, 1])
def test_with_a_bound_of_one_no_token_needs_a_score(H: int) -> None:
    room = Room(5, max_head_lag=H, mask=True)
    room.add([make_segment(4), make_segment(5)], finished=False)
    assert room.run() == RecomputeReport() and not room.scorer.calls


def test_nothing_to_score_does_not_call_the_scorer() -> None:
    room = Room(5)
    room.add([make_segment(5)])
    room.add([make_segment(4, scored=5)])
    room.add([], finished=False)
    assert room.run() == RecomputeReport() and not room.scorer.calls
    at_start = Room(0)
    at_start.add([make_segment(0)])
    assert at_start.run() == RecomputeReport()


def test_a_scorer_that_is_a_collective_is_called_even_with_nothing_to_score() -> None:
    """Each rank holds a shard of the weights: one that stays away hangs the others."""
    idle = Room(5)
    idle.add([make_segment(5)])
    idle.scorer.is_collective = True
    assert idle.run() == RecomputeReport() and idle.scorer.calls == [[]]
    for bound, version in ((1, 5), (4, 0)):  # what all ranks know needs no call
        never = Room(version, max_head_lag=bound)
        never.scorer.is_collective = True
        assert never.run() == RecomputeReport() and not never.scorer.calls


def test_a_segment_that_two_trajectories_share_is_scored_once() -> None:
    room, shared = Room(5), make_segment(4)
    room.add([shared, make_segment(5)], [shared])
    assert room.run() == RecomputeReport(1, 2)


class Acting(VersionScorer):
    """Does something in the middle of scoring."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        result = super().score(trajectories)
        changed = self.act()
        return result if changed is None else changed


@pytest.mark.fault("slow", "score")
def test_a_score_taken_while_its_group_moves_is_not_lost() -> None:
    """Fault: drain, process, put back."""
    room = Room(5)
    queued, running = make_segment(4), make_segment(4)
    first = room.add([queued])
    moving = room.add([running], finished=False)
    taken: list[TrajectoryGroup] = []

    def move() -> None:
        taken.extend(room.registry.take())
        episodes = moving.session.episodes
        room.registry.finish(moving, moving.make_group([e.finish(1.0) for e in episodes]))

    room.run(Acting(move))
    assert taken == [first.finished]
    assert taken[0].segments[0].proximal.version == 5
    assert moving.finished is not None and moving.finished.segments[0].proximal.version == 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param([], "got 1 trajectories and returned 0", id="a trajectory too few"),
        pytest.param([[np.zeros(3)]], "a segment of 2 tokens", id="a token too many"),
        pytest.param([[np.array([0.0, np.nan])]], "one finite log-prob", id="not a number"),
    ],
)
@pytest.mark.fault("corrupted data", "score")
def test_a_wrong_answer_of_the_scorer_is_an_error_and_scores_nothing(
    answer: Any, message: str
) -> None:
    room, segment = Room(5), make_segment(4)
    room.add([segment])
    with pytest.raises(RolloutError, match=message):
        room.run(Acting(lambda: answer))
    assert not segment.proximal.is_set


@pytest.mark.fault("exception", "score")
def test_an_error_of_the_scorer_surfaces() -> None:
    def fail() -> None:
        raise MemoryError("CUDA")

    room = Room(5)
    room.add([make_segment(4)])
    with pytest.raises(MemoryError, match="CUDA"):
        room.run(Acting(fail))


# Over the whole executor --------------------------------------------------------------------------


@pytest.mark.fault("slow", "reward")
def test_a_finished_segment_whose_rollout_waits_for_its_reward_is_scored() -> None:
    """Fault: a component that is wired to nothing: the executor's own recompute does it."""
    go_on, scoring = threading.Event(), threading.Event()

    def reward(completion: str, row: Any) -> float:
        scoring.set()
        go_on.wait(DEADLINE_S)
        return 1.0

    sampling = sdp.SamplingParams(max_new_tokens=4)
    workflow = sdp.RLVRWorkflow(reward, group_size=1, sampling=sampling)
    rows = [{"prompt": "a"}]
    settings = {"batch_size": 1, "max_head_lag": 4, "max_concurrent": 1, "rows": rows}
    with rolling(FakeEngine(), workflow, **settings) as executor:
        assert scoring.wait(DEADLINE_S)
        executor.publish([], 1)
        scorer = VersionScorer()
        assert executor.recompute(scorer) == RecomputeReport(1, 4)
        go_on.set()
        (group,) = executor.take() or []
        assert group.segments[0].proximal.version == 1


@pytest.mark.parametrize("updates_in_flight", [True, False])
def test_every_token_of_lag_two_or_more_was_scored_under_the_version_after_its_own(
    updates_in_flight: bool,
) -> None:
    engine = FakeEngine(99, manual=True, updates_in_flight=updates_in_flight)
    settings = {"batch_size": 1, "max_head_lag": 6, "max_concurrent": 3}
    with rolling(engine, Samples(max_new_tokens=99), **settings) as executor:
        scorer, old = VersionScorer(), 0
        for version in range(12):
            engine.advance(1, awaiting=3)
            rows = [int(entry.request.group_key[2:]) for entry in engine._requests]
            chosen = min(rows) if version % 4 >= 2 else max(rows)  # the oldest, or the newest
            engine.advance(99, only=rows.index(chosen), awaiting=3)
            (group,) = executor.take() or []
            executor.recompute(scorer)
            for segment in group.segments:
                if version - segment.version >= 2:
                    old += 1
                    assert segment.proximal.version == segment.version + 1
            executor.publish([], version + 1)
        assert old > 0 and executor.stat.dropped == 0


def test_the_standard_mode_scores_nothing() -> None:
    executor = make_executor(FakeEngine(), enable_segment_wise_ppo=False)
    assert executor.recompute(VersionScorer()) == RecomputeReport()
    executor.close()
