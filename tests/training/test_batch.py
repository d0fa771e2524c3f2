"""Collation, the sealed envelope and prefixes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sdp_lightning.errors import RolloutError, VersionError
from sdp_lightning.training.batch import Batch, SealedBatch, collate
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

torch.set_num_threads(1)
untimed = settings(deadline=None)
VERSION = 6


def random_group(rng: np.random.Generator, size: int, prompt_length: int) -> TrajectoryGroup:
    """Members share a prompt; contexts and segments of versions up to 6 follow, some scored."""
    prompt = rng.integers(3, 40, prompt_length)
    members = []
    for _ in range(size):
        parts: list[Context | Segment] = [Context(prompt)]
        for version in sorted(rng.integers(0, VERSION + 1, rng.integers(1, 4))):
            length = rng.integers(1, 5)
            parts.append(
                Segment(version, rng.integers(3, 40, length), -rng.random(length), 0.5 + version)
            )
            if version < VERSION and rng.random() < 0.5:
                parts[-1].proximal.set(-rng.random(length), version + 1)
            if rng.random() < 0.4:
                parts.append(Context(rng.integers(3, 40, rng.integers(1, 3))))
        members.append(Trajectory(tuple(parts), reward=float(rng.normal())))
    return TrajectoryGroup(tuple(members), row_id="seven", order=3)


def random_groups(seed: int) -> list[TrajectoryGroup]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, int(rng.integers(1, 4)), int(rng.integers(1, 6))) for _ in range(3)]


def simple_group(*segments: Segment, **arguments: object) -> TrajectoryGroup:
    trajectory = Trajectory((Context([4, 5, 6]), *segments), **arguments)
    return TrajectoryGroup((trajectory,), row_id="seven", order=3)


@untimed
@given(seed=st.integers(0, 2**32 - 1), segment_wise=st.booleans())
def test_every_token_carries_its_own_numbers(seed: int, segment_wise: bool) -> None:
    groups = random_groups(seed)
    batch = collate(groups, version=VERSION, pad_token_id=2, segment_wise=segment_wise)
    row = 0
    for group_id, group in enumerate(groups):
        for trajectory in group.trajectories:
            t = 0
            for part in trajectory.parts:
                for index, token in enumerate(part.token_ids):
                    at = row, t
                    sampled = isinstance(part, Segment)
                    assert batch.input_ids[at] == token
                    assert batch.position_ids[at] == t
                    assert batch.loss_mask[at] == sampled
                    if sampled:
                        score = part.proximal.logprobs if segment_wise else None
                        assert batch.versions[at] == part.version
                        assert batch.lags[at] == VERSION - part.version
                        assert batch.behavior_logprobs[at] == part.logprobs[index]
                        assert batch.temperatures[at] == part.temperature
                        assert batch.segment_scored[at] == (score is not None)
                        q = batch.segment_logprobs[at]
                        assert torch.isnan(q) if score is None else q == score[index]
                    else:
                        assert batch.versions[at] == -1
                        assert not batch.segment_scored[at]
                    t += 1
            assert batch.lengths[row] == t
            assert not batch.loss_mask[row, t:].any()
            assert (batch.input_ids[row, t:] == 2).all()
            assert batch.rewards[row] == np.float32(trajectory.reward)
            assert batch.group_ids[row] == group_id
            row += 1
    assert row == len(batch)
    assert batch.num_tokens == sum(group.num_sampled for group in groups)
    assert not batch.lags[~batch.loss_mask].any()
    assert not batch.loss_mask[:, 0].any()


def test_types_of_a_batch() -> None:
    batch = collate(random_groups(0), version=VERSION)
    floats = ("behavior_logprobs", "segment_logprobs", "temperatures", "rewards")
    bools = ("loss_mask", "segment_scored", "truncated")
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            expected = (
                torch.float32
                if field.name in floats
                else torch.bool
                if field.name in bools
                else torch.int64
            )
            assert value.dtype == expected, field.name


def test_truncated_is_what_did_not_stop_by_itself() -> None:
    groups = [
        simple_group(Segment(0, [7], [-1.0]), finish_reason=reason)
        for reason in ("stop", "length", "abort")
    ]
    assert collate(groups, version=0).truncated.tolist() == [False, True, True]


def scored(version: int, by: int) -> Segment:
    segment = Segment(version, [7], [-1.0])
    segment.proximal.set([-1.0], by)
    return segment


REFUSED = [
    (lambda: simple_group(Segment(3, [7], [-1.0])), VersionError, "version 3, but the trainer"),
    (lambda: simple_group(), RolloutError, "without sampled tokens"),
    (lambda: simple_group(Segment(0, [7], [0.0], 0.0)), RolloutError, r"temperature 0\.0"),
    (lambda: simple_group(scored(0, by=2)), VersionError, "version 0 scored under 2"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
@pytest.mark.fault("corrupted data", "queue")
def test_groups_that_cannot_be_trained_on_are_refused_by_name(
    make: Callable[[], TrajectoryGroup], error: type[Exception], message: str
) -> None:
    good = simple_group(Segment(0, [7], [-1.0]))
    with pytest.raises(error, match=rf"group of row 'seven' \(order 3\).*{message}"):
        collate([good, make()], version=2)


def test_no_groups_are_refused() -> None:
    with pytest.raises(RolloutError, match="at least one group"):
        collate([], version=0)


@untimed
@given(seed=st.integers(0, 999))
def test_select_takes_rows_of_every_tensor_in_the_order_asked_for(seed: int) -> None:
    batch = collate(random_groups(seed), version=VERSION)
    batch = dataclasses.replace(batch, advantages=torch.randn(batch.loss_mask.shape))
    rows = torch.randperm(len(batch)).tolist()[:2]
    chosen = batch.select(rows)
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(
                getattr(chosen, field.name).nan_to_num(), value[rows].nan_to_num()
            ), field.name
    assert chosen.version == VERSION


def test_an_idle_batch_has_a_row_and_nothing_to_learn() -> None:
    idle = collate(random_groups(0), version=VERSION).idle()
    assert (len(idle), idle.num_tokens) == (1, 0)
    assert idle.scored_lengths.tolist() == idle.prefix_lengths.tolist() == [0]


def test_a_sealed_batch_passes_lightnings_precision_and_device_code_untouched() -> None:
    from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
    from lightning_utilities.core.apply_func import apply_to_collection

    batch = collate(random_groups(0), version=VERSION)
    for plugin in (HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")):
        sealed = SealedBatch(batch)
        moved = move_data_to_device(plugin.convert_input(sealed), torch.device("cpu"))
        assert isinstance(moved, SealedBatch)
        for field in dataclasses.fields(Batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(
                    getattr(moved.batch, field.name).nan_to_num(), value.nan_to_num()
                )
                assert getattr(moved.batch, field.name).dtype == value.dtype
    # What the envelope is for: without it the same code rounds or refuses.
    with pytest.raises(ValueError, match="frozen dataclass"):
        HalfPrecision("bf16-true").convert_input(batch)
    rounded = apply_to_collection(
        {"b": batch.behavior_logprobs}, torch.Tensor, _convert_fp_tensor, torch.bfloat16
    )
    assert rounded["b"].dtype == torch.bfloat16


def test_moving_a_sealed_batch_moves_every_tensor() -> None:
    batch = dataclasses.replace(
        collate(random_groups(0), version=VERSION), advantages=torch.zeros(1)
    )
    moved = SealedBatch(batch).to(torch.device("meta")).batch
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(getattr(batch, field.name), torch.Tensor):
            assert value.device.type == "meta", field.name


# Prefixes ----------------------------------------------------------------------------------------


@untimed
@given(seed=st.integers(0, 2**32 - 1))
def test_prefixes_are_the_longest_common_head_before_sampling(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = random_groups(seed)
    # A group whose prompts differ somewhere, and one in which a sampled token is common too.
    prompt = rng.integers(3, 5, 4)
    odd = [Trajectory((Context(rng.integers(3, 5, 4)), Segment(0, [9], [-1.0]))) for _ in range(2)]
    same = [Trajectory((Context(prompt), Segment(0, [9, k], [-1.0, -1.0]))) for k in (7, 8)]
    groups += [TrajectoryGroup(tuple(odd)), TrajectoryGroup(tuple(same))]
    batch = collate(groups, version=VERSION)
    expected: list[int] = []
    for group in groups:
        columns = itertools.takewhile(
            lambda tokens: len(set(tokens)) == 1,
            zip(*(t.token_ids.tolist() for t in group.trajectories), strict=False),
        )
        common = len(list(columns))
        first = min(int(t.parts[0].token_ids.size) for t in group.trajectories)
        expected += [min(common, first)] * len(group.trajectories)
    assert batch.prefix_lengths.tolist() == expected
    last = [int(mask.nonzero().max()) for mask in batch.loss_mask]
    assert batch.scored_lengths.tolist() == last
