"""A fit on prompts that are read one after another, and its resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import FakeEngine
from support.trainers import (
    AwaitIdleRollouts,
    Recorder,
    make_data,
    make_module,
    make_rows,
    make_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def rows() -> Iterator[dict[str, Any]]:
    yield from make_rows(11)


def fit(
    folder: str, prompts: Any, steps: int, resume: Path | None = None, **rollout: Any
) -> tuple[list[str], L.Trainer]:
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), AwaitIdleRollouts(), recorder, max_steps=steps)
    settings = {"num_epochs": 1, "shuffle": False} | rollout
    data = make_data(rows=prompts, engine=FakeEngine(), **settings)
    trainer.fit(make_module(folder), data, ckpt_path=resume, weights_only=True)
    return [row for step in recorder.steps for row in step.row_ids], trainer


@pytest.fixture(scope="module")
def saved(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The rows of 2 batches of 2, and a checkpoint after them, in which 4 groups wait."""
    path = tmp_path_factory.mktemp("saved") / "it.ckpt"
    trained, trainer = fit(model_folder, rows, 2)
    trainer.save_checkpoint(path)
    return trained, path


def test_every_row_is_trained_once_over_a_resume(
    model_folder: str, saved: tuple[list[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    first, path = saved
    second, _ = fit(model_folder, rows(), 99, path)  # a generator, which is made anew
    assert [*first, *second] == [row["id"] for row in make_rows(11)]
    state = torch.load(path, weights_only=True)["RolloutDataModule"]["ranks"][0]
    begun = state["prompts"]["index"]
    assert 8 <= begun <= 10 and f"reading {begun} rows of the prompts rows again" in caplog.text
    assert sorted(row["id"] for *_, row in state["rows"]) == [f"row{i}" for i in range(4, begun)]


@pytest.mark.fault("corrupted data", "resume")
def test_a_stream_is_no_sequence_on_resume_and_restart_begins_it(
    model_folder: str, saved: tuple[list[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="with a stream of prompts, now they are a sequence"):
        fit(model_folder, make_rows(11), 99, saved[1])
    trained, _ = fit(model_folder, make_rows(3), 99, saved[1], prompts_on_resume="restart")
    assert trained == ["row0", "row1", "row2"]


def test_dropped_groups_of_a_checkpoint_are_begun_again_with_their_rows(
    model_folder: str, saved: tuple[list[str], Path]
) -> None:
    """Both that wait are too old for max_head_lag=0: their rows come from the checkpoint."""
    settings = {"max_head_lag": 0, "requeue_dropped": True}
    second, _ = fit(model_folder, rows, 99, saved[1], **settings)
    assert sorted(second) == sorted(row["id"] for row in make_rows(11)[4:])


def test_streams_are_shuffled_where_they_are_made_which_is_said(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = fit(model_folder, rows, 1, shuffle=True)
    assert trained == ["row0", "row1"] and "shuffle=True has no effect" in caplog.text


def test_a_row_that_a_checkpoint_could_not_hold_is_refused_by_name(model_folder: str) -> None:
    def odd() -> Iterator[dict[str, Any]]:
        yield {"id": "a", "prompt": "1+1=", "meta": {"image": object()}}

    with pytest.raises(sdp.RolloutError, match=r"row a\['meta'\]\['image'\] is object, which"):
        fit(model_folder, odd, 1)


def test_rows_to_validate_may_be_a_generator_which_is_read_once(model_folder: str) -> None:
    data = make_data(rows=rows(), val_prompts=rows(), engine=FakeEngine(), num_epochs=1)  # type: ignore[arg-type]
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=2, val_check_interval=1)
    trainer.fit(make_module(model_folder), data)
    assert all("val/reward" in metrics for metrics in recorder.metrics[1:])


def rows_with_bad_ones() -> Iterator[dict[str, Any]]:
    """Beyond the rows that are looked at before a run."""
    for number, row in enumerate(make_rows(24)):
        yield row | ({"prompt": ""} if number in (19, 22) else {})


def test_a_row_that_cannot_be_trained_on_is_left_out_and_said(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = fit(model_folder, rows_with_bad_ones, 99, prompts_check="drop")
    names = [row["id"] for row in make_rows(24)]
    assert trained == [name for name in names if name not in ("row19", "row22")]
    assert "1 row(s) of the prompts rows_with_bad_ones are left out so far" in caplog.text


def test_a_row_that_cannot_be_trained_on_ends_the_run_by_name(model_folder: str) -> None:
    with pytest.raises(sdp.SDPError, match=r"row19.*empty.*prompts_check='drop'"):
        fit(model_folder, rows_with_bad_ones, 99)


class Columns(list[dict[str, Any]]):
    """As ``datasets.Dataset``: a slice is a mapping of columns."""

    def __getitem__(self, index: Any) -> Any:
        assert not isinstance(index, slice), "no row"
        return super().__getitem__(index)


def test_rows_to_validate_are_read_one_by_one(model_folder: str) -> None:
    data = make_data(engine=FakeEngine(), val_prompts=Columns(make_rows(3)))
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1, num_sanity_val_steps=0)
    trainer.fit(make_module(model_folder), data)
    assert "val/reward" in trainer.callback_metrics


def test_what_waits_for_an_epoch_of_a_stream_is_named_once(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_epochs": 1, "check_val_every_n_epoch": 2}
    stop = EarlyStopping("train/reward", check_on_train_epoch_end=True)
    trainer = make_trainer(sdp.WeightSyncCallback(), stop, **settings)
    trainer.fit(make_module(model_folder), make_data(rows=rows, engine=FakeEngine()))
    assert trainer.global_step == 6
    (said,) = [r.getMessage() for r in caplog.records if "one epoch" in r.getMessage()]
    assert "no effect have check_val_every_n_epoch=2, EarlyStopping." in said
    fit(model_folder, rows, 2)
    assert caplog.text.count("no effect have") == 1  # of flags that are as they were
