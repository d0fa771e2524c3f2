"""The last rows of the epochs, which make no whole batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer


def fit(folder: str, **rollout: Any) -> tuple[list[list[str]], int]:
    """The rows of every batch of 5 rows in 2 passes, 3 a batch in 2 minibatches, and the steps."""
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_epochs=-1)
    module = make_module(folder, update=sdp.UpdateConfig(num_minibatches=2))
    order = {"shuffle": False, "max_concurrent": 1}  # one group after another
    data = make_data(rows=make_rows(5), engine=FakeEngine(), batch_size=3, **order, **rollout)
    trainer.fit(module, data)
    return [step.row_ids for step in recorder.steps], trainer.global_step


def test_by_default_all_rows_of_the_epochs_are_trained_in_as_many_minibatches_as_there_are_groups(
    model_folder: str,
) -> None:
    batches, steps = fit(model_folder, num_epochs=2)
    assert batches == [
        ["row0", "row1", "row2"],
        ["row3", "row4", "row0"],  # an epoch that ends within a batch changes nothing
        ["row1", "row2", "row3"],
        ["row4"],
    ]
    assert steps == 2 + 2 + 2 + 1


def test_a_last_batch_is_filled_from_one_more_epoch(model_folder: str) -> None:
    batches, steps = fit(model_folder, num_epochs=1, last_batch="fill")
    assert batches == [["row0", "row1", "row2"], ["row3", "row4", "row0"]] and steps == 4


def test_what_is_dropped_is_counted_and_said(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batches, steps = fit(model_folder, num_epochs=1, last_batch="drop")
    assert batches == [["row0", "row1", "row2"]] and steps == 2
    assert "the last 2 groups are fewer than a batch, and are not trained on" in caplog.text
