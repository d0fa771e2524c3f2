"""Metrics of validate and of the validations of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.stopped_runs import (
    WAIT_S,
    Validations,
)
from support.trainers import make_data, make_module, make_rows, make_trainer


def passes_for_some(completion: str, row: Any) -> float:
    """Row 0 fails; of row 1 at least the first sample passes."""
    if row["id"] == "row0":
        return 0.5
    first = row["id"] not in seen_rows
    seen_rows.add(row["id"])
    return 1.0 if first else 0.0


seen_rows: set[str] = set()


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_evaluation_logs_reward_version_and_pass_at_k(
    model_folder: str, tmp_path: Path, stage: str, group_size: int
) -> None:
    """Of 4 samples of row 0 none passes, of row 1 one: mean (4 * 0.5 + 1) / 8, pass@4 1 / 2."""
    seen_rows.clear()
    seen = Validations()
    greedy = sdp.SamplingParams(max_new_tokens=4, temperature=0.0 if group_size == 1 else 1.0)
    data = sdp.RolloutDataModule(
        make_rows(),
        sdp.RLVRWorkflow(lambda text, row: len(text) / 9, group_size=2, sampling=greedy_off()),
        engine=FakeEngine(),
        rollout=sdp.RolloutConfig(batch_size=2, timeout_s=WAIT_S),
        val_prompts=make_rows(2),
        val_workflow=sdp.RLVRWorkflow(passes_for_some, group_size=group_size, sampling=greedy),
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), seen, max_steps=2, num_sanity_val_steps=0)
    getattr(trainer, stage)(make_module(model_folder), data)
    version = 2.0 if stage == "fit" else 0.0
    if group_size == 1:
        assert seen.found == [{"val/reward": 0.75, "val/version": version}]
    else:
        expected = {"val/reward": 0.375, "val/pass_at_k": 0.5, "val/version": version}
        assert seen.found == [expected]


def greedy_off() -> sdp.SamplingParams:
    return sdp.SamplingParams(max_new_tokens=4)


class Batches(Callback):
    """Counts the batches of the validations, with those of the sanity check apart."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.batches: dict[bool, int] = {False: 0, True: 0}

    def reward(self, completion: str, row: Any) -> float:
        self.rows.append(row["id"])
        return float(int(row["id"].removeprefix("row")) < 4)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.batches[trainer.sanity_checking] += 1


@pytest.mark.parametrize(
    ("limits", "num_rows", "batches"),
    [
        ({"limit_val_batches": 2, "num_sanity_val_steps": 1}, 2 + 4, {True: 1, False: 2}),
        ({"limit_val_batches": 0.7, "num_sanity_val_steps": 0}, 4, {True: 0, False: 2}),
        ({"num_sanity_val_steps": -1}, 7 + 7, {True: 4, False: 4}),
    ],
    ids=["an int", "a fraction of four", "all"],
)
def test_limits_of_validation_count_batches_of_rows(
    model_folder: str, limits: dict[str, Any], num_rows: int, batches: dict[bool, int]
) -> None:
    seen, found = Batches(), Validations()
    workflow = sdp.RLVRWorkflow(seen.reward, group_size=2, sampling=greedy_off())
    data = make_data(
        engine=FakeEngine(), val_prompts=make_rows(7), val_workflow=workflow, batch_size=2
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), seen, found, max_steps=1, **limits)
    trainer.fit(make_module(model_folder), data)
    assert len(seen.rows) == 2 * num_rows and seen.batches == batches
    if num_rows == 14:  # the mean is over rows, not over batches, of which the last has one
        assert found.found[-1]["val/reward"] == pytest.approx(4 / 7)
        assert found.found[-1]["val/pass_at_k"] == pytest.approx(4 / 7)
