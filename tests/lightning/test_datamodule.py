"""The data module: what it refuses, how long its loader is, and what validation costs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.testing import FakeEngine
from support.trainers import (
    AwaitIdleRollouts,
    Recorder,
    executor_of,
    make_data,
    make_module,
    make_rows,
    make_trainer,
    make_workflow,
)

VAL_ROWS = [{"id": f"val{i}", "prompt": f"{i}-{i}=", "worth": i % 2} for i in range(4)]


def worth(completion: str, row: Any) -> float:
    return float(row.get("worth", 10))


def validating_data(**settings: Any) -> sdp.RolloutDataModule:
    return make_data(make_workflow(worth), engine=FakeEngine(), val_prompts=VAL_ROWS, **settings)


@dataclass(eq=False)
class ValidationRecorder(Callback):
    """The ledger and the version around every validation."""

    stats: list[tuple[RolloutStat, RolloutStat]] = field(default_factory=list[Any])
    versions: list[int] = field(default_factory=list[int])
    rewards: list[float] = field(default_factory=list[float])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before = executor_of(trainer).stat

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stats.append((self._before, executor_of(trainer).stat))
        self.versions.append(int(trainer.callback_metrics["val/version"]))
        self.rewards.append(float(trainer.callback_metrics["val/reward"]))


# What is refused ----------------------------------------------------------------------------------


def test_greedy_sampling_cannot_be_trained_on() -> None:
    with pytest.raises(sdp.ConfigError, match=r"temperature 0.*positive temperature"):
        make_data(make_workflow(temperature=0.0))


def test_a_greedy_validation_is_allowed() -> None:
    greedy = make_workflow(temperature=0.0)
    data = sdp.RolloutDataModule(make_rows(), make_workflow(), val_workflow=greedy)
    assert data.val_workflow is greedy


def test_a_run_that_nothing_ends_is_refused(model_folder: str) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), max_epochs=-1)
    with pytest.raises(sdp.ConfigError, match=r"max_steps, max_epochs or max_time, or num_epochs"):
        trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))


class OtherModule(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> None: ...


def test_another_module_is_refused() -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1, limit_val_batches=0)
    with pytest.raises(sdp.ConfigError, match=r"SegmentWisePPOModule; found OtherModule"):
        trainer.fit(OtherModule(), make_data(engine=FakeEngine()))


@pytest.mark.parametrize(
    "loss",
    [sdp.LossConfig(trust_region="behavior"), sdp.LossConfig(trust_region="proximal")],
    ids=["behavior", "proximal"],
)
def test_dropping_the_unscored_needs_a_loss_that_has_them_scored(
    model_folder: str, loss: sdp.LossConfig
) -> None:
    data = make_data(engine=FakeEngine(), missing_proximal="drop")
    with pytest.raises(sdp.ConfigError, match=r"missing_proximal='drop'.*never has segments"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(
            make_module(model_folder, loss=loss), data
        )


def test_a_mode_without_scores_may_have_any_missing_proximal(model_folder: str) -> None:
    data = make_data(
        engine=FakeEngine(), missing_proximal="drop", enable_segment_wise_ppo=False, max_head_lag=0
    )
    module = make_module(model_folder, loss=sdp.LossConfig(trust_region="behavior"))
    make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(module, data)
    assert module.trainer.global_step == 1


def test_a_mode_without_segments_refuses_a_centre_that_needs_them(model_folder: str) -> None:
    data = make_data(engine=FakeEngine(), enable_segment_wise_ppo=False)
    module = make_module(model_folder, loss=sdp.LossConfig(trust_region="past"))
    with pytest.raises(sdp.ConfigError, match=r"trust_region='past'.*Use trust_region='proximal'"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(module, data)


def test_more_minibatches_than_groups_are_refused_before_anything_is_sampled(
    model_folder: str,
) -> None:
    engine = FakeEngine()
    module = make_module(model_folder, update=sdp.UpdateConfig(num_minibatches=4))
    with pytest.raises(sdp.ConfigError, match=r"batch_size=2 .* num_minibatches=4"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=4).fit(module, make_data(engine=engine))
    assert engine.num_requests == 0


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"batch_size": 3}, r"batch_size=3 .* over 2 processes: use 2 or 4"),
        ({"batch_size": 1}, r"batch_size=1 .* over 2 processes: use 2"),
        ({"batch_size": 4, "max_concurrent": 5}, r"max_concurrent=5 .* use 4 or 6"),
    ],
)
def test_counts_that_processes_cannot_share_evenly_are_refused(
    model_folder: str, rollout: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), devices=2, strategy="ddp", max_steps=1)
    trainer.strategy.connect(make_module(model_folder))
    data = make_data(engine=FakeEngine(), **rollout)
    data.trainer = trainer
    with pytest.raises(sdp.ConfigError, match=message):
        data.setup("fit")


def test_no_prompts_are_refused(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match="prompts is empty"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(
            make_module(model_folder), make_data(rows=[], engine=FakeEngine())
        )


def test_validating_without_rows_is_refused(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match="val_prompts"):
        make_trainer(sdp.WeightSyncCallback()).validate(
            make_module(model_folder), make_data(engine=FakeEngine()), verbose=False
        )


def test_the_executor_exists_during_a_run_only(model_folder: str) -> None:
    data = make_data(engine=FakeEngine())
    for _ in range(2):
        with pytest.raises(sdp.ConfigError, match=r"setup\(\) to teardown\(\)"):
            _ = data.executor
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(make_module(model_folder), data)
        data = make_data(engine=FakeEngine())


# Prompts and loader -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ROWS", "make"])
def test_prompts_are_found_by_name(model_folder: str, tmp_path: Path, name: str) -> None:
    text = f"ROWS = {make_rows(4)!r}\ndef make():\n    return ROWS\n"
    (tmp_path / f"prompts_{name}.py").write_text(text)
    place: Any = f"{tmp_path}/prompts_{name}.py:{name}"
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=2)
    trainer.fit(make_module(model_folder), make_data(rows=place, engine=FakeEngine()))
    trained = [row for step in recorder.steps for row in step.row_ids]
    assert sorted(trained) == ["row0", "row1", "row2", "row3"]


@pytest.mark.parametrize(
    ("settings", "rollout", "length"),
    [
        ({"max_steps": 6}, {}, 3),
        ({"max_steps": -1, "max_epochs": -1}, {"num_epochs": 2}, 8),
    ],
)
def test_the_loader_has_a_length_so_nothing_is_fetched_ahead(
    model_folder: str, settings: dict[str, Any], rollout: dict[str, Any], length: int
) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert len(trainer.train_dataloader) == length  # type: ignore[arg-type]

    update = sdp.UpdateConfig(num_minibatches=2)
    trainer = make_trainer(sdp.WeightSyncCallback(), Look(), **settings)
    trainer.fit(make_module(model_folder, update=update), make_data(engine=FakeEngine(), **rollout))


def test_the_oldest_groups_are_trained_first(model_folder: str) -> None:
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), AwaitIdleRollouts(), recorder, max_steps=4)
    trainer.fit(make_module(model_folder), make_data(engine=FakeEngine(), shuffle=False))
    trained = [row for step in recorder.steps for row in step.row_ids]
    assert trained == [f"row{i}" for i in range(8)]


@pytest.mark.parametrize("embedded", [True, False])
def test_the_trainer_leaves_the_engine_its_cores_and_takes_them_back(
    model_folder: str, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.seen = torch.get_num_threads()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    before, look = torch.get_num_threads(), Look()
    torch.set_num_threads(cores + 1)
    try:
        data = make_data(engine="embedded" if embedded else FakeEngine())
        make_trainer(sdp.WeightSyncCallback(), look, max_steps=1).fit(
            make_module(model_folder), data
        )
        assert look.seen == (max(1, cores - 1) if embedded else cores + 1)
        assert torch.get_num_threads() == cores + 1
    finally:
        torch.set_num_threads(before)


# Validation ---------------------------------------------------------------------------------------


def test_validate_publishes_before_a_fit_and_sees_the_last_version_after_it(
    model_folder: str,
) -> None:
    model, sync = make_module(model_folder), sdp.WeightSyncCallback()
    for version in (0, 2):
        trainer = make_trainer(sync, max_steps=version)
        (found,) = trainer.validate(model, validating_data(), verbose=False)
        assert found == {"val/reward": 0.5, "val/pass_at_k": 0.5, "val/version": version}
        (found,) = trainer.test(model, validating_data(), verbose=False)
        assert found == {"test/reward": 0.5, "test/pass_at_k": 0.5, "test/version": version}
        if version == 0:
            make_trainer(sync, max_steps=2, limit_val_batches=0).fit(model, validating_data())


@pytest.mark.parametrize(
    ("interval", "versions"),
    [
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, [0, 2, 4]),
        ({"val_check_interval": 0.5}, [0, 2, 4]),
        ({}, [0, 4]),
        ({"num_sanity_val_steps": 0}, [4]),
    ],
    ids=["int", "float", "default", "no sanity check"],
)
def test_validation_spends_no_capacity_and_moves_no_version(
    model_folder: str, interval: dict[str, Any], versions: list[int]
) -> None:
    """Every training row that may be submitted has been before each validation: none follows."""
    seen, recorder = ValidationRecorder(), Recorder()
    trainer = make_trainer(
        sdp.WeightSyncCallback(), AwaitIdleRollouts(), seen, recorder, max_steps=4, **interval
    )
    trainer.fit(make_module(model_folder), validating_data(max_head_lag=1))
    assert seen.versions == versions
    assert seen.rewards == [0.5] * len(versions)
    assert recorder.engine_versions == [0, 1, 2, 3, 4]
    assert [max(lags) for lags in recorder.lags] == [0, 1, 1, 1]
    for version, (before, after) in zip(versions, seen.stats, strict=True):
        assert before.submitted == after.submitted
        assert after.submitted in (0, (1 + version + 1) * 2)  # 0: the sanity check
        assert before.consumed == after.consumed == 2 * version


def test_without_rows_to_validate_none_is_tried(model_folder: str) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))
    assert "val/reward" not in trainer.callback_metrics


def test_evaluation_rows_that_are_all_rejected_are_an_error(model_folder: str) -> None:
    class Rejects(sdp.RolloutWorkflow):
        sampling = sdp.SamplingParams()

        async def run(self, row: Any, session: Any) -> None:
            return None

    data = sdp.RolloutDataModule(
        make_rows(),
        make_workflow(),
        engine=FakeEngine(),
        val_prompts=VAL_ROWS,
        val_workflow=Rejects(),
    )
    with pytest.raises(sdp.RolloutError, match="all 4 evaluation rows were rejected"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(make_module(model_folder), data)
