"""GDPO: each of several rewards normalized in its group, their sum over the batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.training.batch import Batch, blank_batch, collate
from sdp_lightning.training.loss import batch_advantages, gdpo_advantages
from sdp_lightning.training.metrics.train_step import step_values
from sdp_lightning.training.update import PolicyUpdate
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

CPU = torch.device("cpu")
EPS = 1e-6
Rewards = dict[str, float]


def make_batch(groups: list[list[Rewards]], weights: Rewards) -> Batch:
    segment = Segment(0, [3, 4], [-1.0, -1.0])
    bare = Trajectory((Context([1]), segment))
    made = [
        TrajectoryGroup(tuple(bare.with_rewards(each, weights) for each in group), f"row{number}")
        for number, group in enumerate(groups)
    ]
    return collate(made, version=0)


def deviation(values: list[float], std: str) -> float:
    mean = sum(values) / len(values)
    count = len(values) if std == "population" else max(len(values) - 1, 1)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / count)


def by_loops(groups: list[list[Rewards]], weights: Rewards, std: str) -> list[float]:
    """The formula with nothing but loops: normalize in the group, weigh, normalize in the batch."""
    sums: list[float] = []
    for group in groups:
        for member in group:
            total = 0.0
            for name, weight in weights.items():
                column = [other[name] for other in group]
                mean = sum(column) / len(column)
                total += weight * (member[name] - mean) / (deviation(column, std) + EPS)
            sums.append(total)
    mean, spread = sum(sums) / len(sums), deviation(sums, std)
    return [(value - mean) / (spread + EPS) for value in sums]


numbers = st.sampled_from([0.0, 0.25, 1.0, -3.0, 5.5])
members = st.fixed_dictionaries({"correct": numbers, "form": numbers, "speed": numbers})


@settings(deadline=None)
@given(
    groups=st.lists(st.lists(members, min_size=1, max_size=4), min_size=1, max_size=4),
    weights=st.fixed_dictionaries({n: numbers for n in ("correct", "form", "speed")}),
    std=st.sampled_from(["population", "sample"]),
)
def test_agrees_with_loops_over_groups_of_any_size(
    groups: list[list[Rewards]], weights: Rewards, std: Any
) -> None:
    batch = make_batch(groups, weights)
    update = UpdateConfig(advantages="gdpo", group_std=std)
    found = batch_advantages(batch, LossConfig(), update, RankSums(CPU))
    assert found.shape == (len(batch), 3) and found.dtype == torch.float32
    assert found[:, 1].tolist() == pytest.approx(by_loops(groups, weights, std), abs=1e-4)


def test_by_hand_it_tells_apart_what_the_sum_does_not() -> None:
    """Figure 2 of the paper: (0, 1) and (0, 2) beside (0, 0) have the same advantage under GRPO.

    Group 1: format 0 and 1, correct equal: -1, +1. Group 2: both 0 and 1: -2, +2. The squares of
    the batch are 1 + 1 + 4 + 4 over 4: deviation sqrt(2.5) = 1.58114.
    """
    none, one, two = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}
    batch = make_batch([[none, one], [none, two]], {"a": 1.0, "b": 1.0})
    of = {
        kind: batch_advantages(batch, LossConfig(), UpdateConfig(advantages=kind), RankSums(CPU))
        for kind in ("group", "gdpo")
    }
    assert of["group"][:, 1].tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], abs=1e-5)
    expected = [-1 / 1.58114, 1 / 1.58114, -2 / 1.58114, 2 / 1.58114]
    assert of["gdpo"][:, 1].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_batch_is_that_of_all_ranks() -> None:
    groups: list[list[Rewards]] = [
        [{"a": 0.0, "b": 3.0}, {"a": 1.0, "b": 1.0}],
        [{"a": 2.0, "b": 2.0}, {"a": 2.0, "b": 0.5}, {"a": 0.0, "b": 0.5}],
    ]
    weights, update = {"a": 1.0, "b": 0.2}, UpdateConfig(advantages="gdpo")

    class Both(RankSums):
        """Rank 0 of two, beside the numbers that rank 1 has."""

        def table(self, *values: float) -> list[tuple[float, ...]]:
            told.append(values)
            return [values, *others]

    told: list[tuple[float, ...]] = []
    others: list[tuple[float, ...]] = []
    gdpo_advantages(make_batch(groups[1:], weights), update, Both(CPU))
    others = told[:1]
    found = gdpo_advantages(make_batch(groups[:1], weights), update, Both(CPU))
    assert found.tolist() == pytest.approx(by_loops(groups, weights, "population")[:2], abs=1e-5)


def test_a_group_is_uniform_if_each_reward_is_that_counts() -> None:
    """The sums of group 0 are equal, its rewards are not; group 1 differs where the weight is 0."""
    groups: list[list[Rewards]] = [
        [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0}],
        [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 1.0, "b": 0.0, "c": 1.0}],
    ]
    batch = make_batch(groups, {"a": 1.0, "b": 1.0, "c": 0.0})
    steps = [{"loss": torch.tensor(0.0)}]
    assert step_values(batch, steps, 1)["train/uniform"] == (1.0, 2)
    values = step_values(batch, steps, 1, apart=True)
    assert values["train/uniform"] == (0.5, 2)
    assert [values[f"train/reward/{n}"] for n in "abc"] == [(0.75, 4), (0.25, 4), (0.25, 4)]


def test_a_rank_without_groups_has_the_same_names_and_counts_in_no_mean() -> None:
    groups: list[list[Rewards]] = [[{"a": 0.0, "b": 3.0}, {"a": 1.0, "b": 1.0}]]
    batch, blank = make_batch(groups, {"a": 1.0, "b": 0.2}), blank_batch(0, ("a", "b"))
    steps = [{"loss": torch.tensor(0.0)}]
    values = step_values(blank, steps, 2, apart=True)
    assert values.keys() == step_values(batch, steps, 2, apart=True).keys()
    means = ("train/reward", "train/reward/a", "train/uniform", "train/truncated")
    assert all(values[name][1] == 0 for name in means)
    assert values["train/masked_truncated"][0] == 0
    told: list[tuple[float, ...]] = []

    class Rank(RankSums):
        def table(self, *values: float) -> list[tuple[float, ...]]:
            told.append(values)
            return [values, (2.0, 0.0, 2.0)]

    gdpo_advantages(blank, UpdateConfig(advantages="gdpo"), Rank(CPU))
    assert told == [(0, 0.0, 0.0)]


def test_what_does_not_go_together_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"gdpo.*scale_advantages_by_std=False"):
        UpdateConfig(advantages="gdpo", scale_advantages_by_std=False)
    loss = LossConfig(kl_coefficient=0.1, kl_in="reward")
    with pytest.raises(ConfigError, match=r"gdpo.*kl_in='reward'.*kl_in='loss'"):
        PolicyUpdate(loss, sdp.OptimizerConfig(), UpdateConfig(advantages="gdpo"))
    batch = make_batch([[{"a": 1.0}, {"a": 0.0}]], {"a": 1.0})
    single = replace(batch, named_rewards=None, reward_weights=None, reward_names=())
    with pytest.raises(ConfigError, match=r"one without a name.*rewards=\{\.\.\.\}"):
        gdpo_advantages(single, UpdateConfig(advantages="gdpo"), RankSums(CPU))


def test_trajectories_of_other_names_are_refused_and_the_row_named() -> None:
    bare = Trajectory((Context([1]), Segment(0, [3], [-1.0])))
    named = [bare.with_rewards({name: 1.0}, {name: 1.0}) for name in ("a", "b")]
    groups = [TrajectoryGroup((each,), f"row {n}") for n, each in enumerate(named)]
    with pytest.raises(RolloutError, match=r"row 'row 1' .*\['b'\].*row 'row 0' \['a'\]"):
        collate(groups, version=0)
    groups[1] = TrajectoryGroup((bare,), "plain")
    with pytest.raises(RolloutError, match=r"row 'plain' has rewards named \[\]"):
        collate(groups, version=0)


def test_views_say_why_a_group_has_no_such_advantages() -> None:
    bare = Trajectory((Context([1]), Segment(0, [3], [-1.0])))
    each = [bare.with_rewards({"form": v}, {"form": 2.0}) for v in (0.5, 0.25)]
    html = sdp.view(TrajectoryGroup(tuple(each)), update=UpdateConfig(advantages="gdpo")).html()
    assert "GDPO normalizes them over the batch" in html
    assert "<b>0.25</b> reward form" in html and "<b>0.5</b> reward</div>" in html
    batch = make_batch([[{"form": 0.75}, {"form": 0.0}]], {"form": 2.0})
    assert "<b>0.75</b> reward form" in sdp.view(batch).html()
