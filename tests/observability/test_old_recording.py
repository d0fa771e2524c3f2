"""A recording that was written before modules moved into rooms is read and replayed."""

from __future__ import annotations

import pytest

import sdp_lightning as sdp
from support.old_data import OLD_MODEL, OLD_RECORDING, expected_of_old_run
from support.recordings import Losses
from support.trainers import make_trainer


def test_its_batches_are_read() -> None:
    recording = sdp.Recording(OLD_RECORDING)
    assert recording.versions == [0, 1, 2]
    assert recording.is_whole is None, "nobody knows: it has no end mark"
    assert recording.settings.segment_wise and recording.settings.is_scored
    batches = list(recording)
    rows = [[group.row_id for group in batch.groups] for batch in batches]
    assert rows == expected_of_old_run()["trained_rows"]
    (group,) = batches[2].groups
    (first, second), _ = (trajectory.segments for trajectory in group.trajectories)
    assert (first.version, second.version, first.proximal.version) == (0, 1, 1)
    assert first.proximal.logprobs is not None and first.proximal.logprobs.shape == (3,)


def test_a_replay_has_the_metrics_of_the_run() -> None:
    losses = Losses()
    module = sdp.SegmentWisePPOModule(OLD_MODEL, optimizer=sdp.OptimizerConfig(lr=1e-3))
    data = sdp.ReplayDataModule(OLD_RECORDING)
    make_trainer(losses, max_steps=3).fit(module, datamodule=data)
    expected = expected_of_old_run()["metrics"]
    assert len(losses.steps) == len(expected)
    for found, step in zip(losses.steps, expected, strict=True):
        assert {name: found[name] for name in step} == pytest.approx(step, rel=1e-4, abs=1e-5)
