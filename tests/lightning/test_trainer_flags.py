"""Every flag of the Trainer and every callback of Lightning works here, or says that it cannot."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import callbacks as lc
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.lightning.trainer_flags import refuse_callbacks
from sdp_lightning.testing import FakeEngine
from support.trainer_flags_page import CALLBACKS, FLAGS, Case, page
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

PAGE = Path(__file__).parents[2] / "docs/reference/trainer-flags.md"


def test_the_page_has_all_flags_and_callbacks_and_is_that_of_the_cases() -> None:
    assert list(FLAGS) == [*inspect.signature(L.Trainer.__init__).parameters][1:]
    assert list(CALLBACKS) == lc.__all__
    assert PAGE.read_text() == page()


@pytest.mark.parametrize(
    "name", [n for n, (case, _) in CALLBACKS.items() if case.status == "refused"]
)
def test_a_refused_callback_is_named_with_what_to_use(name: str) -> None:
    """Also one that a user derived from it."""
    _, make = CALLBACKS[name]
    assert make is not None
    callback = make()
    with pytest.raises(sdp.ConfigError, match=name):
        refuse_callbacks([Callback(), callback])
    callback.__class__ = type("Mine", (type(callback),), {})
    with pytest.raises(sdp.ConfigError, match=r"^Mine "):
        refuse_callbacks([callback])


def fit(folder: str, *callbacks: Callback, minibatches: int = 1, **settings: Any) -> L.Trainer:
    """Fit 8 rows, 2 a batch, without a WeightSyncCallback."""
    update = sdp.UpdateConfig(num_minibatches=minibatches)
    trainer = make_trainer(*callbacks, **settings)
    data = make_data(rows=make_rows(8), engine=FakeEngine(), val_prompts=make_rows(3))
    trainer.fit(make_module(folder, update=update), data)
    return trainer


def test_flags_are_translated(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """6 steps in batches of 2: the multiples 3 and 6 of 3 are at or before the ends 4 and 6."""
    caplog.set_level(logging.INFO)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    flags: dict[str, Any] = {"gradient_clip_val": 1e-9, "enable_checkpointing": True}
    trainer = fit(model_folder, saver, minibatches=2, max_steps=6, **flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=4.ckpt", "step=6.ckpt"]
    module = trainer.lightning_module
    assert isinstance(module, sdp.SegmentWisePPOModule)
    assert module.optimizer.gradient_clip_val == 1e-9
    added = [r.getMessage() for r in caplog.records if "WeightSyncCallback" in r.getMessage()]
    assert len(added) == 1 and "is added" in added[0]
    assert isinstance(trainer.callbacks[0], sdp.WeightSyncCallback)  # type: ignore[attr-defined]
    state = trainer.callback_metrics
    assert state["rollout/version"] == 3


def test_a_trial_trains_whole_batches(model_folder: str) -> None:
    assert fit(model_folder, minibatches=2, fast_dev_run=2).global_step == 4


def test_overfitting_trains_on_the_first_rows_again(model_folder: str) -> None:
    recorder = Recorder()
    fit(model_folder, sdp.WeightSyncCallback(), recorder, overfit_batches=2, max_epochs=2)
    assert {row for step in recorder.steps for row in step.row_ids} == {f"row{i}" for i in range(4)}
    assert len(recorder.steps) == 4


RUN = {name: case for name, case in FLAGS.items() if case.settings is not None}


@pytest.mark.parametrize(
    "name",
    [
        n if c.status == "refused" else pytest.param(n, marks=pytest.mark.slow)
        for n, c in RUN.items()
    ],
)
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to .self.log.. but .Trainer.barebones")
def test_a_flag_does_what_the_page_says(model_folder: str, name: str) -> None:
    case = RUN[name]
    settings = dict(case.settings or {})
    if name == "barebones":  # it refuses the flags that it turns off
        data = make_data(rows=make_rows(8), engine=FakeEngine())
        trainer = L.Trainer(accelerator="cpu", devices=1, **settings)
        trainer.fit(make_module(model_folder), data)
        assert trainer.global_step == case.steps
    elif case.status == "refused":
        with pytest.raises(sdp.ConfigError, match=name):
            fit(model_folder, **settings)
    else:
        assert fit(model_folder, **settings).global_step == case.steps


RUN_CALLBACKS: dict[str, tuple[Case, Any]] = {
    name: (case, make)
    for name, (case, make) in CALLBACKS.items()
    if make is not None and case.status == "works"
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_CALLBACKS)
def test_a_callback_that_works_goes_through_a_fit(model_folder: str, name: str) -> None:
    case, make = RUN_CALLBACKS[name]
    assert fit(model_folder, make(), max_steps=2).global_step == case.steps
