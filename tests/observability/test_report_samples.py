"""Trajectories that a report keeps."""

from __future__ import annotations

import json
import math
from typing import Any

from sdp_lightning.observability.report.samples import NUM_EXTREME, NUM_RANDOM, SampleKeeper
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup


def group_of(*rewards: float, row: str = "row", versions: tuple[int, ...] = (0,)) -> Any:
    parts = (Context([1]), *(Segment(version, [3], [-0.1]) for version in versions))
    return TrajectoryGroup(tuple(Trajectory(parts, reward=r) for r in rewards), row_id=row)


def test_the_best_and_the_worst_are_kept_one_of_a_batch_the_newer_first() -> None:
    keeper = SampleKeeper()
    for version in range(6):
        keeper.see([group_of(1.0, 0.5, row=f"a{version}"), group_of(0.0)], version)
    keeper.see([group_of(2.0, 0.1, row="top")], 6)
    assert [s.row_id for s in keeper.best] == ["top", "a5", "a4"]
    assert [s.trajectory.reward for s in keeper.worst] == [0.0] * NUM_EXTREME
    assert [s.version for s in keeper.worst] == [5, 4, 3]
    assert keeper.mixed == []


def test_trajectories_of_several_versions_are_kept() -> None:
    keeper = SampleKeeper()
    keeper.see([group_of(0.0, versions=(0, 1, 2), row="three"), group_of(1.0)], 2)
    keeper.see([group_of(0.0, versions=(1, 2), row="two"), group_of(1.0)], 3)
    assert [s.row_id for s in keeper.mixed] == ["three", "two"]


def test_every_batch_has_the_same_chance_to_be_among_the_random_ones() -> None:
    num_batches, num_runs = 40, 400
    kept = [0] * num_batches
    for seed in range(num_runs):
        keeper = SampleKeeper(seed)
        for version in range(num_batches):
            keeper.see([group_of(0.0)], version)
        assert len(keeper.random) == NUM_RANDOM
        for sample in keeper.random:
            kept[sample.version] += 1
    expected = num_runs * NUM_RANDOM / num_batches  # 60, with a deviation of about 7
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in kept)


def test_a_trajectory_is_drawn_once() -> None:
    keeper, drawn = SampleKeeper(), list[str]()

    def draw(sample: Any) -> str:
        drawn.append(sample.row_id)
        return "<p></p>"

    keeper.see([group_of(1.0, 0.0)], 0)
    first, again = keeper.state(draw), keeper.state(draw)
    assert first == again and len(drawn) == len(set(map(id, keeper.best + keeper.worst))) + 1
    assert json.dumps(first)
