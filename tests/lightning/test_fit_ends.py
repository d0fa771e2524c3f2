"""Fits that end by themselves: max_steps, max_time, early stopping, prompts that end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer

from sdp_lightning.testing import FakeEngine
from support.stopped_runs import (
    Run,
    Validations,
)
from support.trainers import make_rows

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize(
    ("settings", "data", "versions"),
    [
        ({"max_steps": -1}, {"num_epochs": 1}, [20]),
        ({"max_steps": 5, "val_check_interval": 2}, {}, [2, 4, 5]),
        ({"max_steps": 4, "val_check_interval": 2}, {}, [2, 4]),
        ({"max_steps": 5, "limit_val_batches": 0}, {}, []),
    ],
    ids=["prompts that end", "between two validations", "at a validation", "switched off"],
)
def test_a_fit_ends_with_a_validation_of_its_last_version(
    model_folder: str,
    tmp_path: Path,
    settings: dict[str, Any],
    data: dict[str, Any],
    versions: list[float],
) -> None:
    seen = Validations()
    settings = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None} | settings
    settings["data"] = {"val_prompts": make_rows(2)} | data
    if settings["max_steps"] == -1:
        settings["max_epochs"] = 1
    run = Run(model_folder, tmp_path, seen, **settings)
    run.fit()
    assert seen.versions == versions
    assert run.trainer.state.finished


def test_early_stopping_on_the_reward_ends_a_fit(model_folder: str, tmp_path: Path) -> None:
    """The reward of the fake's validation never changes: two validations without patience."""
    seen = Validations()
    stop = EarlyStopping("val/reward", mode="max", patience=1, min_delta=2.0)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    data = {"val_prompts": make_rows(2)}
    run = Run(model_folder, tmp_path, seen, stop, data=data, num_sanity_val_steps=0, **settings)
    run.fit()
    assert run.sync.version == 4
    assert seen.versions == [2, 4]


def test_max_time_ends_a_wait_for_rollouts(model_folder: str, tmp_path: Path) -> None:
    """Lightning itself looks at the clock after a step only, and this step never comes."""
    data = {"timeout_s": 1e6}
    engine = FakeEngine(manual=True)
    run = Run(
        model_folder, tmp_path, engine=engine, data=data, max_steps=-1, max_time={"seconds": 1}
    )
    run.fit()
    assert run.sync.version == 0
    assert run.trainer.state.finished


class TimeOfSteps(Timer):
    """The clock of ``max_time``, on which a step takes a second, however long it lasts."""

    steps = 0

    def time_elapsed(self, stage: Any = "train") -> float:
        return float(self.steps) + self._offset

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        super().on_train_batch_end(*args, **kwargs)


def test_max_time_ends_a_fit_with_a_validation(model_folder: str, tmp_path: Path) -> None:
    seen, clock = Validations(), TimeOfSteps({"seconds": 3})
    data = {"val_prompts": make_rows(2)}
    run = Run(model_folder, tmp_path, clock, seen, data=data, max_steps=-1)
    run.fit()
    assert run.sync.version == clock.steps >= 3
    assert seen.versions[-1] == run.sync.version


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_max_time_counts_each_job_of_a_chain(model_folder: str, tmp_path: Path) -> None:
    versions, resume = [0], None
    for job in range(3):
        clock = TimeOfSteps({"seconds": 2})
        run = Run(model_folder, tmp_path, clock, max_steps=-1)
        run.fit(ckpt_path=resume)
        resume = tmp_path / f"{job}.ckpt"
        run.trainer.save_checkpoint(resume)
        versions.append(run.sync.version)
    assert versions == [0, 2, 4, 6]
