"""A logger that raises is named once and set aside; the run and its error are untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

import sdp_lightning as sdp
from sdp_lightning.lightning.ending import LOGGER_METHODS
from sdp_lightning.testing import FakeEngine
from support.failing_observers import At, DiskFull, fail, nothing, run, set_aside
from support.trainers import make_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class FullLogger(CSVLogger):
    """Its disk is full from the second save on."""

    saves = 0

    def save(self) -> None:
        self.saves += 1
        if self.saves > 1:
            raise DiskFull


@pytest.mark.parametrize("own", [nothing, fail], ids=["healthy", "failing"])
def test_a_logger_on_a_full_disk_is_named_once_and_set_aside(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    logger = FullLogger(tmp_path, flush_logs_every_n_steps=1)
    if own is fail:
        with pytest.raises(ValueError, match="the real error"):
            run(model_folder, At(own), logger=logger)
    else:
        assert run(model_folder, At(own), logger=logger).global_step == 4
    assert set_aside(caplog, "FullLogger") == 1 and logger.saves == 2
    logger.saves = -100
    run(model_folder, logger=logger)
    assert logger.saves > -99, "the next run asks it again"
    assert set_aside(caplog, "FullLogger") == 1


class Hostile(Logger):
    """A logger of somebody else, which fails in one of its methods."""

    fails_in = ""
    calls = 0

    def _may_fail(self, name: str) -> None:
        if name == self.fails_in:
            self.calls += 1
            raise DiskFull

    @property
    def name(self) -> str:
        return "hostile"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> None:
        self._may_fail("experiment")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._may_fail("log_metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._may_fail("log_hyperparams")

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self._may_fail("log_graph")

    def save(self) -> None:
        self._may_fail("save")

    def finalize(self, status: str) -> None:
        self._may_fail("finalize")

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._may_fail("after_save_checkpoint")


@pytest.mark.fault("exception", "observer")
@pytest.mark.parametrize("own", [nothing, fail], ids=["healthy", "failing"])
def test_whatever_a_logger_fails_in_it_is_named_once_and_the_run_is_untouched(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    methods = [*LOGGER_METHODS, "experiment"]
    loggers = [type(f"Fails_in_{name}", (Hostile,), {"fails_in": name})() for name in methods]
    module = make_module(model_folder)
    module.save_hyperparameters({"seed": 1})
    trainer = make_trainer(
        *(
            sdp.WeightSyncCallback(failing_callbacks="raise"),
            At(own),
            ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1),
        ),
        logger=[*loggers, CSVLogger(tmp_path, name="", version="whole")],
        enable_checkpointing=True,
        max_steps=4,
        log_every_n_steps=1,
    )
    if own is fail:
        with pytest.raises(ValueError, match="the real error") as info:
            trainer.fit(module, make_data(engine=FakeEngine()))
        assert info.value.__context__ is None
    else:
        trainer.fit(module, make_data(engine=FakeEngine()))
    for name, logger in zip(methods, loggers, strict=True):
        assert set_aside(caplog, f"Fails_in_{name}") == logger.calls == 1, name
    written = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert len(written) == (3 if own is fail else 5), "the others log on"
