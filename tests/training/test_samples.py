"""Samples of several trajectories: rewards, baselines and means of sequences count each once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.errors import RolloutError
from sdp_lightning.objective import loss_denominator
from sdp_lightning.objective.loss import loss_of_rows
from sdp_lightning.observability.recording.table import RecordedBatch, batch_of, rows_of
from sdp_lightning.training.batch import Batch, collate, one_row_a_sample, tokens_of_samples
from sdp_lightning.training.loss import batch_advantages
from sdp_lightning.training.metrics.train_step import step_values
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

SUMS = RankSums(torch.device("cpu"))
LOSS = LossConfig()


def branch(sample: int | None, reward: float, length: int = 2, **more: Any) -> Trajectory:
    segment = Segment(0, range(3, 3 + length), [-1.0] * length)
    return Trajectory((Context([1]), segment), reward, sample=sample, **more)


def batch_of_samples(groups: list[list[tuple[float, int]]], *, branched: bool) -> Batch:
    """Groups of samples, each of a reward and a number of branches, or of one trajectory each."""
    made = [
        TrajectoryGroup(
            tuple(
                branch(number, reward)
                for number, (reward, count) in enumerate(group)
                for _ in range(count if branched else 1)
            )
        )
        for group in groups
    ]
    return collate(made, version=0)


SAMPLES = st.lists(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 1.0, -2.5]), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=3,
)


@given(SAMPLES, st.sampled_from(["group", "rloo"]))
@settings(deadline=None)
def test_each_branch_has_the_advantage_that_its_sample_has_without_branches(
    groups: list[list[tuple[float, int]]], advantages: Any
) -> None:
    update = UpdateConfig(advantages=advantages)
    found = batch_advantages(batch_of_samples(groups, branched=True), LOSS, update, SUMS)[:, -1]
    alone = batch_advantages(batch_of_samples(groups, branched=False), LOSS, update, SUMS)[:, -1]
    counts = torch.tensor([count for group in groups for _, count in group])
    assert torch.equal(found, alone.repeat_interleave(counts))


@given(SAMPLES)
@settings(deadline=None)
def test_what_is_logged_of_rewards_counts_samples(groups: list[list[tuple[float, int]]]) -> None:
    steps = [{"loss": torch.zeros(())}]
    names = ("train/reward", "train/reward_std", "train/uniform")
    found, alone = (
        step_values(batch_of_samples(groups, branched=branched), steps, 1)
        for branched in (True, False)
    )
    for name in names:
        assert found[name] == alone[name]


def test_the_reward_of_a_group_is_the_mean_of_its_samples() -> None:
    own = [branch(7, 1.0), branch(None, 0.0), branch(7, 1.0), branch(None, 0.0)]
    group = TrajectoryGroup(tuple(own))
    assert group.samples == [[0, 2], [1], [3]]
    assert group.reward == pytest.approx(1 / 3)
    assert group.attempts == (own[0], own[1], own[3])


def test_branches_whose_rewards_differ_count_with_their_mean() -> None:
    """A penalty for length, say, is each branch's own."""
    group = TrajectoryGroup((branch(0, 1.0), branch(0, 0.0), branch(1, 0.5)))
    whole, sample = one_row_a_sample(collate([group], version=0))
    assert whole.rewards.tolist() == [0.5, 0.5] and sample.tolist() == [0, 0, 1]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_loss_and_gradient_are_those_of_samples_that_were_not_branched(aggregation: Any) -> None:
    """Two samples of 6 and 3 tokens; the first is in one row, or in rows of 2 and 4 tokens."""
    length = {"aggregation_length": 7} if aggregation == "constant" else {}
    config = LossConfig(aggregation=aggregation, **length)
    torch.manual_seed(0)
    values = torch.randn(9, 5) / 10
    ids: list[list[list[int]]] = [[[*range(6)], [6, 7, 8]], [[0, 1], [2, 3, 4, 5], [6, 7, 8]]]
    found: list[tuple[float, torch.Tensor]] = []
    for rows, sample_ids in zip(ids, ([0, 1], [0, 0, 1]), strict=True):
        target = values[:, 0].clone().requires_grad_()
        mask = torch.zeros(len(rows), 7, dtype=torch.bool)
        places = torch.zeros(len(rows), 7, dtype=torch.long)
        for row, tokens in enumerate(rows):
            mask[row, 1 : 1 + len(tokens)] = True
            places[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        own = torch.tensor(sample_ids)
        batch = replace(
            collate([TrajectoryGroup((branch(0, 0.0),))], version=0),
            loss_mask=mask,
            sample_ids=own,
        )
        columns = [values[:, i][places] for i in range(1, 5)]
        denominator = float(loss_denominator(mask, config, own))
        shares = tokens_of_samples(batch)
        assert shares is not None
        total = torch.zeros(())
        for row in range(len(rows)):  # each row in a micro-batch of its own
            piece = slice(row, row + 1)
            result = loss_of_rows(
                (target[places][piece], *(column[piece] for column in columns)),
                mask[piece],
                config=config,
                num_tokens=denominator,
                sequence_tokens=shares[piece],
            )
            total = total + result.loss
        total.backward()
        assert target.grad is not None
        found.append((float(total.detach()), target.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-6)
    assert float(found[0][1].abs().min()) > 0


def test_a_recording_knows_the_sample_of_a_trajectory() -> None:
    group = TrajectoryGroup((branch(0, 1.0), branch(0, 1.0), branch(None, 0.0)), row_id="r")
    rows = list(rows_of(RecordedBatch(1, 0, (group,), ((0, 0),)), 0))
    (read,) = batch_of(rows, "file").groups
    assert [t.sample for t in read.trajectories] == [0, 0, None]
    old = [{k: v for k, v in row.items() if k != "sample"} for row in rows]
    assert [t.sample for t in batch_of(old, "file").groups[0].trajectories] == [None] * 3


@pytest.mark.parametrize("sample", [-1, True, "0"])
def test_a_sample_that_is_no_number_is_refused(sample: Any) -> None:
    with pytest.raises(RolloutError, match=f"sample.*{sample!r}"):
        sdp.Trajectory((Context([1]),), sample=sample)
