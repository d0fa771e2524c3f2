"""Settings that change on resume are in force, or refused, and said; the module's are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer, weights_of

# These trainers save by hand, after the fit.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

FIRST = sdp.OptimizerConfig(lr=1e-3)


class Groups(Callback):
    """Learning rate and weight decay of every batch, and the betas."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.betas: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        (group,) = trainer.optimizers[0].param_groups
        self.seen.append((round(group["lr"], 9), group["weight_decay"]))
        self.betas = group["betas"]


def fit(
    folder: str, resume: Path | None, steps: int, *callbacks: Callback, **settings: Any
) -> L.Trainer:
    trainer = make_trainer(
        sdp.WeightSyncCallback(), *callbacks, max_steps=steps, **settings.pop("trainer", {})
    )
    settings = {"optimizer": FIRST} | settings
    data = make_data(rows=make_rows(40), engine=FakeEngine(), batch_size=4)
    trainer.fit(make_module(folder, **settings), data, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def checkpoint(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After 3 optimizer steps, one a batch."""
    path = tmp_path_factory.mktemp("saved") / "three.ckpt"
    fit(model_folder, None, 3).save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (FIRST, [(1e-3, 0.0)] * 3),
        (sdp.OptimizerConfig(lr=1e-4), [(1e-4, 0.0)] * 3),
        (sdp.OptimizerConfig(lr=1e-3, weight_decay=0.1), [(1e-3, 0.1)] * 3),
        (
            sdp.OptimizerConfig(lr=1e-3, schedule="linear", betas=(0.5, 0.6)),
            [(0.0005, 0.0), (0.000333333, 0.0), (0.000166667, 0.0)],
        ),
    ],
    ids=["the same", "learning rate", "weight decay", "schedule and betas"],
)
def test_an_optimizer_goes_on_with_the_settings_of_this_fit(
    model_folder: str, checkpoint: Path, changed: sdp.OptimizerConfig, expected: Any
) -> None:
    """A linear decay over 6 steps has 3, 2 and 1 sixth of its rate left."""
    seen = Groups()
    fit(model_folder, checkpoint, 6, seen, optimizer=changed)
    assert seen.seen == expected
    assert tuple(seen.betas) == tuple(changed.betas)


def test_what_an_optimizer_keeps_of_itself_is_not_configured_anew(
    model_folder: str, tmp_path: Path
) -> None:
    """A user's callback halves the rate; the settings are the same, so that is left alone."""

    class Plain(sdp.SegmentWisePPOModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.require_policy().parameters(), lr=self.optimizer.lr)

    class Halve(Callback):
        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] /= 2

    def run(steps: int, resume: Path | None, lr: float, callback: Callback) -> L.Trainer:
        trainer = make_trainer(sdp.WeightSyncCallback(), callback, max_steps=steps)
        module = Plain(model_folder, optimizer=sdp.OptimizerConfig(lr=lr))
        data = make_data(rows=make_rows(40), engine=FakeEngine())
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return trainer

    run(1, None, 1e-3, Halve()).save_checkpoint(tmp_path / "a.ckpt")
    for lr, expected in ((1e-3, 5e-4), (1e-2, 5e-3)):
        trainer = run(2, tmp_path / "a.ckpt", lr, Callback())
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_minibatches_may_change_if_whole_batches_reach_max_steps(
    model_folder: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 7 steps 4 are left: 2 batches of 2, or 1 of 4, and none of 3."""
    recorder = Recorder()
    update = sdp.UpdateConfig(num_minibatches=2)
    trainer = fit(model_folder, checkpoint, 7, recorder, update=update)
    assert trainer.global_step == 7 and len(recorder.steps) == 2
    assert "model.update.num_minibatches  1    2" in caplog.text
    with pytest.raises(sdp.ConfigError, match=r"leaves 4 steps after step 3.*use 6 or 9"):
        fit(model_folder, checkpoint, 7, update=sdp.UpdateConfig(num_minibatches=3))


def test_hyperparameters_reach_a_logger_and_make_the_module_again(
    model_folder: str, tmp_path: Path
) -> None:
    loss = sdp.LossConfig(clip_epsilon=0.3)
    settings = {"loss": loss, "lora": sdp.LoRAConfig(rank=2, target_modules=("q_proj",))}
    logger = {"logger": CSVLogger(tmp_path, name=""), "log_every_n_steps": 1}
    trainer = fit(model_folder, None, 2, **settings, trainer=logger)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = (tmp_path / "version_0" / "hparams.yaml").read_text()
    for line in ("clip_epsilon: 0.3", "lr: 0.001", "batch_size: 4", "max_new_tokens: 6"):
        assert line in saved
    assert "weigh_letters" in saved
    again = sdp.SegmentWisePPOModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.loss, again.optimizer, again.lora) == (loss, FIRST, settings["lora"])
    module: Any = trainer.lightning_module
    for name, value in weights_of(module).items():
        assert value.equal(weights_of(again)[name])
    other = sdp.SegmentWisePPOModule.load_from_checkpoint(tmp_path / "a.ckpt", optimizer={"lr": 1})
    assert other.optimizer.lr == 1 and other.loss == loss
    with pytest.raises(sdp.ConfigError, match="LossConfig has no 'clip'"):
        sdp.SegmentWisePPOModule(model_folder, loss={"clip": 1})  # type: ignore
