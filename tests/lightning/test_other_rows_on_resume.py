"""A checkpoint that is resumed over other rows: refused, or begun anew as the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import FakeEngine
from support.trainers import (
    AwaitIdleRollouts,
    Recorder,
    make_data,
    make_module,
    make_trainer,
)

# These trainers save by hand, after the fit.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def rows_named(name: str, count: int = 8) -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "prompt": f"{i}+{i}="} for i in range(count)]


def fit(
    folder: str, rows: Any, steps: int, resume: Path | None = None, **settings: Any
) -> tuple[Recorder, L.Trainer]:
    recorder = Recorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), AwaitIdleRollouts(), recorder, max_steps=steps)
    data = make_data(rows=rows, engine=FakeEngine(), num_epochs=1, **settings)
    trainer.fit(make_module(folder), data, ckpt_path=resume, weights_only=True)
    return recorder, trainer


@pytest.fixture(scope="module")
def checkpoint(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after 2 batches of 2, in which 4 groups wait."""
    path = tmp_path_factory.mktemp("saved") / "old.ckpt"
    fit(model_folder, rows_named("old"), 2)[1].save_checkpoint(path)
    return path


@pytest.mark.fault("corrupted data", "resume")
def test_other_rows_of_the_same_number_are_refused(model_folder: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="made with 8 other prompts"):
        fit(model_folder, rows_named("new"), 9, checkpoint)


def test_restart_begins_all_rows_and_keeps_version_and_weights(
    model_folder: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, trainer = fit(
        model_folder, rows_named("new", 10), 9, checkpoint, prompts_on_resume="restart"
    )
    trained = [row for step in recorder.steps for row in step.row_ids]
    assert sorted(trained) == sorted(row["id"] for row in rows_named("new", 10))
    assert recorder.engine_versions == [2, 3, 4, 5, 6, 7]
    assert trainer.global_step == 7  # 2 of the checkpoint's and 5 on
    assert recorder.metrics[-1]["rollout/discarded"] == 4
    assert "4 finished and 0 unfinished groups of the checkpoint are discarded" in caplog.text


def test_the_same_rows_go_on(model_folder: str, checkpoint: Path) -> None:
    recorder, trainer = fit(model_folder, rows_named("old"), 9, checkpoint)
    assert len({row for step in recorder.steps for row in step.row_ids}) == 4
    assert trainer.global_step == 4
