"""Trajectories that a report keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from sdp_lightning.observability.report.samples import (
    MOST_FIELDS,
    NUM_EXTREME,
    NUM_RANDOM,
    SampleKeeper,
    row_fields,
)
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


def test_a_trajectory_keeps_the_fields_of_its_own_row() -> None:
    keeper = SampleKeeper()
    groups = [replace(group_of(reward), order=order) for order, reward in ((7, 0.0), (4, 1.0))]
    keeper.see(groups, 0, {7: {"answer": "seven"}, 4: {"answer": "four"}})
    state = keeper.state(lambda sample: "<p></p>")
    assert state["best"][0]["row"] == {"answer": "four"}
    assert state["worst"][0]["row"] == {"answer": "seven"}


def test_fields_are_short_whatever_a_row_holds() -> None:
    class Loud:
        def __repr__(self) -> str:
            return "<loud>\x1b[0m" * 100

    row = {"a": "x" * 1000, "b": ["y" * 1000] * 1000, "c": Loud(), "d": None, "\x00": 10**2000}
    fields = row_fields(row)
    assert list(fields) == ["a", "b", "c", "d", "\u2400"] and fields["d"] == "None"
    assert all(len(text) < 200 and text.isprintable() for text in fields.values())
    many = row_fields({f"k{i}": i for i in range(MOST_FIELDS + 3)})
    assert len(many) == MOST_FIELDS + 1 and many[""] == "and 3 more fields"
