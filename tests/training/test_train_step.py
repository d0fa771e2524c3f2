"""Batches that teach nothing: counted, warned of, and in the end an error."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from sdp_lightning.training.batch import blank_batch, collate
from sdp_lightning.training.metrics.train_step import step_values, uniform_share
from sdp_lightning.training.metrics.uniform_rewards import WARN_AFTER, UniformWatch
from support.rollouts import make_group
from support.trainers import make_data, make_module, make_trainer, make_workflow


def test_a_group_is_uniform_if_its_rewards_are_equal() -> None:
    rewards = torch.tensor([0.0, -2.0, 1.0, -2.0, 0.0, 3.0])
    groups = torch.tensor([7, 5, 7, 5, 9, 11])
    assert uniform_share(rewards, groups).item() == 0.75  # 5, 9 and 11; 7 has 0 and 1


def test_a_rank_counts_in_a_mean_by_its_rows_or_groups_and_a_blank_one_does_not() -> None:
    batch = collate([make_group([0], [0]), make_group([0])], version=0)
    steps = [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}]
    blank = step_values(blank_batch(0), steps, num_ranks=2)
    for name, (value, weight) in step_values(batch, steps, num_ranks=2).items():
        by = {f"train/{name}": 3 for name in ("reward", "length", "truncated")}
        by |= {"train/uniform": 2, "train/reward_std": 2}
        assert weight == by.get(name, 1) and blank[name][1] == (0 if name in by else 1), name
        if name == "train/loss":
            assert value.item() == 1.5


def test_length_counts_what_was_sampled_and_spread_is_of_groups() -> None:
    """Two segments of 2 tokens, one, and three; 1 and 3 in a group differ by 1 from their mean."""
    first = make_group([0, 0], [0])
    rewarded = (replace(t, reward=r) for t, r in zip(first.trajectories, (1.0, 3.0), strict=True))
    cut = replace(make_group([0, 0, 0]).trajectories[0], finish_reason="length", reward=5.0)
    groups = [replace(first, trajectories=tuple(rewarded)), sdp.TrajectoryGroup((cut,))]
    batch = collate(groups, version=0).without_truncated()
    values = step_values(batch, [{"loss": torch.tensor(0.0)}], num_ranks=1)
    assert values["train/length"][0].item() == (4 + 2 + 6) / 3  # that of a masked row, too
    assert values["train/tokens"][0].item() == 4 + 2
    assert values["train/reward_std"][0].item() == (1 + 0) / 2


def test_many_in_a_row_are_warned_of_once_and_more_are_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = UniformWatch(2 * WARN_AFTER)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for _ in range(2 * WARN_AFTER - 1):
                watch.note(1.0, reward=0.0)
            watch.note(0.9, reward=0.1)  # one group of ten differs: the count begins anew
    assert [record.getMessage()[:24] for record in caplog.records] == ["in 10 batches in a row a"]
    for _ in range(2 * WARN_AFTER - 1):
        watch.note(1.0, reward=1.0)
    with pytest.raises(sdp.SDPError, match=r"in 20 batches in a row .* \(mean 1\)\. Siblings"):
        watch.note(1.0, reward=1.0)


def test_without_a_limit_it_warns_and_never_ends_a_run(caplog: pytest.LogCaptureFixture) -> None:
    watch = UniformWatch(None)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            watch.note(1.0, reward=0.0)
    assert len(caplog.records) == 1


def test_a_fit_whose_rewards_never_differ_ends_with_what_to_do(model_folder: str) -> None:
    workflow = make_workflow(lambda completion, row: 0.5)
    module = make_module(model_folder, update=sdp.UpdateConfig(max_uniform_in_a_row=3))
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=5)
    with pytest.raises(sdp.SDPError, match=r"in 3 batches in a row .* give partial credit"):
        trainer.fit(module, make_data(workflow, engine=FakeEngine()))
    assert trainer.global_step == 3


def test_the_limit_is_at_least_one_batch() -> None:
    with pytest.raises(sdp.ConfigError, match="max_uniform_in_a_row"):
        sdp.UpdateConfig(max_uniform_in_a_row=0)
