"""Helpers of the tests of recordings: batches made by hand, and runs that are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.observability.recording import RecordedBatch, RecordingSettings, RecordingWriter
from support.rollouts import make_segment
from support.steps import StepRecorder
from support.trainers import StagedWorkflow, VersionClock, make_data, make_trainer

SETTINGS = RecordingSettings(
    model="tiny",
    tokenizer="50 tokens, 0123456789ab",
    segment_wise=True,
    missing_proximal="behavior",
    max_lag=None,
    is_scored=True,
)


def make_batch(version: int, num_groups: int = 2) -> RecordedBatch:
    """Groups with a tool's output, a scored segment and an unscored one."""
    groups = [
        sdp.TrajectoryGroup(
            tuple(
                sdp.Trajectory(
                    (
                        sdp.Context([1, 2]),
                        make_segment(max(0, version - 2), scored=max(0, version - 2) + 1),
                        sdp.Context([7]),
                        make_segment(version),
                    ),
                    reward=0.1 * member + version,
                    finish_reason=("stop", "length", "abort")[member],
                )
                for member in range(3)
            ),
            row_id=f"row {place}",
            order=10 * version + place,
            created_version=version,
        )
        for place in range(num_groups)
    ]
    places = tuple((version, place) for place in range(num_groups))
    return RecordedBatch(version, 2 * version, tuple(groups), places)


def write(
    folder: Path,
    versions: Sequence[int],
    *,
    rank: int = 0,
    run: int = 0,
    is_killed: bool = False,
    **settings: Any,
) -> None:
    """One start of a run that trained on ``versions``, two of them a file; it ends, or is killed
    after its last file."""
    fields = {name: settings.get(name, value) for name, value in vars(SETTINGS).items()}
    writer = RecordingWriter(
        folder,
        RecordingSettings(**fields),
        rank=rank,
        run=run,
        first_version=versions[0],
        rows_per_file=12,
    )
    for version in versions:
        writer.add(make_batch(version))
    writer.flush()
    if not is_killed:
        writer.close()


def assert_same_group(found: sdp.TrajectoryGroup, expected: sdp.TrajectoryGroup) -> None:
    """Bit by bit."""
    for name in ("row_id", "order", "created_version", "head_version", "tail_version"):
        assert getattr(found, name) == getattr(expected, name)
    for one, other in zip(found.trajectories, expected.trajectories, strict=True):
        assert (one.reward, one.finish_reason) == (other.reward, other.finish_reason)
        for a, b in zip(one.parts, other.parts, strict=True):
            assert type(a) is type(b) and np.array_equal(a.token_ids, b.token_ids)
            if isinstance(a, sdp.Segment) and isinstance(b, sdp.Segment):
                assert a.logprobs.tobytes() == b.logprobs.tobytes()
                assert (a.version, a.temperature, a.kv_on_update) == (
                    *(b.version, b.temperature, b.kv_on_update),
                )
                assert a.proximal.version == b.proximal.version
                if a.proximal.logprobs is not None and b.proximal.logprobs is not None:
                    assert a.proximal.logprobs.tobytes() == b.proximal.logprobs.tobytes()


class Losses(Callback):
    """Every metric of the loss, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        elsewhere = ("rollout/", "rollout_time/", "time/", "publish/", "run/", "speed/", "wait")
        found = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.steps.append({k: v for k, v in found.items() if not k.startswith(elsewhere)})


def record(
    folder: str, target: Path, *, steps: int = 10, lag: int = 3, **module: Any
) -> tuple[sdp.SegmentWisePPOModule, Losses, StepRecorder]:
    """A run whose segments are up to ``lag`` versions old, and scored."""
    clock, losses, seen = VersionClock(), Losses(), StepRecorder()
    rows = [{"id": f"r{i}", "prompt": f"{i}+{i}=", "stages": 1 + i % 4} for i in range(64)]
    data = make_data(
        StagedWorkflow(clock),
        rows=rows,
        max_head_lag=lag,
        max_concurrent=6,
        shuffle=False,
        on_overdue="wait",
    )
    model = make_recorded_module(folder, **module)
    order = [
        *(sdp.WeightSyncCallback(), clock, sdp.Recorder(target, rows_per_file=8)),
        *(losses, seen),
    ]
    make_trainer(*order, max_steps=steps).fit(model, data)
    return model, losses, seen


def make_recorded_module(folder: str, **settings: Any) -> sdp.SegmentWisePPOModule:
    settings = {
        "optimizer": sdp.OptimizerConfig(lr=1e-3),
        "update": sdp.UpdateConfig(num_minibatches=2),
    } | settings
    return sdp.SegmentWisePPOModule(folder, **settings)
