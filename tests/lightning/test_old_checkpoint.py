"""A checkpoint that was written before modules moved into rooms resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sdp_lightning as sdp
from support.old_data import OLD_MODEL, expected_of_old_run, unpack_old_checkpoint
from support.trainers import (
    Judge,
    Recorder,
    StagedWorkflow,
    VersionClock,
    make_data,
    make_trainer,
)

VERSION = 3  # of the checkpoint


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, sdp.WeightSyncCallback]:
    rows = [
        {"id": f"row{i}", "prompt": f"{i}+{i}=", "stages": 6 if i == 1 else 1 + i % 3}
        for i in range(16)
    ]
    clock, recorder, sync = VersionClock(), Recorder(), sdp.WeightSyncCallback()
    data = make_data(
        StagedWorkflow(clock),
        rows=rows,
        num_epochs=1,
        batch_size=1,
        max_head_lag=6,
        max_concurrent=8,
        shuffle=False,
        on_overdue="wait",
    )
    module = sdp.SegmentWisePPOModule(OLD_MODEL, optimizer=sdp.OptimizerConfig(lr=1e-3))
    checkpoint = unpack_old_checkpoint(tmp_path_factory.mktemp("old"))
    trainer = make_trainer(sync, clock, recorder, max_steps=16)
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return recorder, sync


def test_its_version_goes_on(resumed: tuple[Recorder, sdp.WeightSyncCallback]) -> None:
    recorder, sync = resumed
    assert recorder.engine_versions == list(range(VERSION, 17)) and sync.version == 16


def test_its_weights_come_back(
    resumed: tuple[Recorder, sdp.WeightSyncCallback], tmp_path: Path
) -> None:
    state = torch.load(unpack_old_checkpoint(tmp_path), weights_only=True)["state_dict"]
    for name, value in resumed[0].weights[VERSION].items():
        torch.testing.assert_close(state[f"policy.{name}"], value, rtol=0, atol=0)


def test_no_row_is_trained_twice_and_none_is_lost(
    resumed: tuple[Recorder, sdp.WeightSyncCallback],
) -> None:
    before = [row for rows in expected_of_old_run()["trained_rows"] for row in rows]
    after = [row for step in resumed[0].steps for row in step.row_ids]
    assert sorted(before + after) == sorted(f"row{i}" for i in range(16))


def test_an_unfinished_row_goes_on_behind_the_segments_that_it_had(
    resumed: tuple[Recorder, sdp.WeightSyncCallback], tmp_path: Path
) -> None:
    state = torch.load(unpack_old_checkpoint(tmp_path), weights_only=True)
    running = state["RolloutDataModule"]["ranks"][0]["running"]
    (old,) = [group for group in running if group["row_id"] == "row1"]
    (group,) = [g for step in resumed[0].steps for g in step.groups if g.row_id == "row1"]
    assert group.created_version == 0
    for trajectory, log in zip(group.trajectories, old["logs"], strict=True):
        assert [segment.version for segment in trajectory.segments] == list(range(6))
        saved = [entry for entry in log if "version" in entry]
        assert 1 <= len(saved) < 6
        for segment, entry in zip(trajectory.segments, saved, strict=False):
            assert segment.token_ids.tolist() == entry["token_ids"].tolist()
            assert segment.logprobs.tolist() == entry["logprobs"].tolist()


def test_scores_that_it_holds_are_those_of_the_weights_that_made_them(
    resumed: tuple[Recorder, sdp.WeightSyncCallback],
) -> None:
    """Version 3 is the first that the resumed run has the weights of, so it scores version 2."""
    judge = Judge(OLD_MODEL)
    old, scored_here = 0, 0
    for step in resumed[0].steps:
        for trajectory in [t for group in step.groups for t in group.trajectories]:
            for index, segment in enumerate(trajectory.segments):
                if segment.proximal.version is None:
                    continue
                assert segment.proximal.version == segment.version + 1
                if segment.proximal.version < VERSION:
                    old += 1
                    continue
                weights = resumed[0].weights[segment.proximal.version]
                expected = judge.segment_logprobs(weights, trajectory)[index]
                found = torch.tensor(segment.proximal.logprobs)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
                scored_here += 1
    assert old and scored_here
