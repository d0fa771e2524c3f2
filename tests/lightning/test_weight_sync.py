"""The callback: what it publishes, what it has scored, what it logs, what it refuses."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.lightning.phase_timer import PHASES
from sdp_lightning.testing import FakeEngine
from support.trainers import (
    AwaitIdleRollouts,
    Recorder,
    StagedWorkflow,
    VersionClock,
    make_data,
    make_module,
    make_rows,
    make_trainer,
)


def test_all_weights_are_published_at_the_start_and_the_trained_ones_after(
    model_folder: str,
) -> None:
    engine = FakeEngine()
    model = make_module(model_folder, trainable=r"layers\.1\.")
    make_trainer(sdp.WeightSyncCallback(), max_steps=2).fit(model, make_data(engine=engine))
    assert model.policy is not None
    everything = tuple(model.policy.state_dict())
    trained = tuple(name for name in everything if "layers.1." in name)
    assert engine.published == [(0, everything), (1, trained), (2, trained)]


def test_nothing_is_generated_before_the_first_publish(model_folder: str) -> None:
    class Look(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            assert engine.version is None and engine.num_requests == 0

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert engine.version == 0

    engine = FakeEngine()
    make_trainer(sdp.WeightSyncCallback(), Look(), max_steps=1).fit(
        make_module(model_folder), make_data(engine=engine)
    )


class SkipAVersion(Callback):
    """Does what a forgotten publish would: the trainer counts on, the batch does not."""

    def __init__(self, sync: sdp.WeightSyncCallback) -> None:
        self._sync = sync

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._sync.version += 1


@pytest.mark.fault("corrupted data", "queue")
def test_a_batch_of_another_version_than_the_trainers_is_an_error(model_folder: str) -> None:
    sync = sdp.WeightSyncCallback()
    trainer = make_trainer(sync, SkipAVersion(sync), max_steps=2)
    with pytest.raises(sdp.VersionError, match=r"taken at version 0.*trainer is at 1"):
        trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))


@pytest.mark.parametrize(
    ("loss", "scored"),
    [
        (sdp.LossConfig(), True),
        (sdp.LossConfig(trust_region="past"), True),
        (sdp.LossConfig(trust_region="proximal", bridge_exponent=0.5), True),
        (sdp.LossConfig(trust_region="proximal"), False),
        (sdp.LossConfig(trust_region="behavior"), False),
    ],
    ids=["segment", "past", "bridged", "proximal", "behavior"],
)
def test_segments_are_scored_only_for_a_loss_that_reads_the_score(
    model_folder: str, loss: sdp.LossConfig, scored: bool
) -> None:
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), AwaitIdleRollouts(), recorder, max_steps=4)
    trainer.fit(make_module(model_folder, loss=loss), make_data(engine=FakeEngine()))
    batch = recorder.steps[-1].batch
    assert batch.lags.max() == 2
    assert bool(batch.segment_scored.any()) == scored
    assert (recorder.metrics[-1]["bridge/approximated_share"] == 0.0) == scored


def test_times_and_lengths_are_those_of_the_step(model_folder: str) -> None:
    recorder = Recorder()
    make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=2).fit(
        make_module(model_folder), make_data()
    )
    logged = recorder.metrics[-1]
    assert all(math.isfinite(value) for value in logged.values())
    assert logged["rollout/version"] == 2
    assert logged["rollout/trained_length"] <= 12  # 2 samples of at most 6 tokens
    phases = [logged[f"time/{phase}_s"] for phase in PHASES]
    assert min(phases) >= 0 and logged["time/train_s"] > 0
    assert sum(phases) <= logged["time/step_s"]
    assert 0 <= logged["time/sampling_s"] <= logged["time/step_s"]
    assert logged["rollout_time/group_s"] >= logged["rollout_time/sample_s"] > 0


def test_counts_are_those_of_when_the_batch_was_taken(model_folder: str) -> None:
    engine, recorder = FakeEngine(), Recorder()
    data = make_data(engine=engine, batch_size=2, max_head_lag=0)
    make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=3).fit(
        make_module(model_folder), data
    )
    for step, logged in zip(recorder.steps, recorder.metrics, strict=True):
        tokens = {side: logged[f"speed/{side}_tokens_per_s"] * logged["time/step_s"]
                  for side in ("train", "generated")}  # fmt: skip
        # On policy, what was sampled since the last batch is this batch, and nothing is left.
        assert tokens["train"] == pytest.approx(step.batch.num_tokens, rel=1e-4)
        assert tokens["generated"] == pytest.approx(step.batch.num_tokens, rel=1e-4)
        assert logged["rollout/running"] == logged["rollout/pending"] == 0


def test_dropped_groups_are_reported_with_their_length_and_warned_of_once(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every third row needs 4 versions, under a bound of 1: it is always dropped, 12 tokens in."""
    clock, recorder = VersionClock(), Recorder()
    rows = [row | {"stages": 4 if i % 3 == 1 else 1} for i, row in enumerate(make_rows(90))]
    data = make_data(
        StagedWorkflow(clock),
        rows=rows,
        engine=FakeEngine(),
        batch_size=1,
        max_head_lag=1,
        shuffle=False,
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), clock, recorder, max_steps=40)
    with caplog.at_level(logging.WARNING, logger="sdp_lightning"):
        trainer.fit(make_module(model_folder), data)
    last = recorder.metrics[-1]
    assert last["rollout/dropped_overdue"] + last["rollout/dropped_stale"] > 5
    assert last["rollout/trained_length"] == 6
    assert last["rollout/dropped_length"] == 12
    share = last["rollout/dropped_overdue"] + last["rollout/dropped_stale"]
    share /= share + last["rollout/version"]  # one group is trained on a version
    assert last["rollout/length_ratio"] == pytest.approx(6 / (6 + 6 * share), rel=1e-3)
    warned = [r for r in caplog.records if "biased against long rollouts" in r.getMessage()]
    assert len(warned) == 1
    assert "of them while their reward or environment ran" in warned[0].getMessage()
    assert "lower reward_timeout_s" in warned[0].getMessage()
    aside = [r for r in caplog.records if "nothing of it was sampled for" in r.getMessage()]
    assert len(aside) == 1 and aside[0].getMessage().startswith("row 'row1' went stale while its")
    trained = [row for step in recorder.steps for row in step.row_ids]
    assert all(int(row.removeprefix("row")) % 3 != 1 for row in trained)


def test_the_callback_needs_the_module_and_the_data_module_of_this_package(
    model_folder: str,
) -> None:
    class Other(L.LightningDataModule):
        def train_dataloader(self) -> list[int]:
            return [1]

        def val_dataloader(self) -> list[int]:
            return [1]

    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1, limit_val_batches=0)
    with pytest.raises(sdp.ConfigError, match=r"found SegmentWisePPOModule and Other"):
        trainer.fit(make_module(model_folder), Other())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_trainer_without_the_callback_gets_one(model_folder: str, stage: str) -> None:
    trainer = make_trainer(max_steps=1, num_sanity_val_steps=0)
    versions: list[Any] = []
    for _ in "12":  # and no second one in the next run
        data = make_data(engine=FakeEngine(), val_prompts=make_rows(2))
        getattr(trainer, stage)(make_module(model_folder), data)
        versions.append(trainer.callback_metrics.get("val/version"))
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds.count(sdp.WeightSyncCallback) == 1
    assert versions[0] == (1 if stage == "fit" else 0)
