"""No checkpoint in the middle of a step, whoever asks: SLURM, a callback, another handler."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.stopped_runs import CallAt, Run, fail, saved_in
from support.trainers import make_module

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]

MIDDLE = 5  # an optimizer step: the second one of the batch of version 2
END = 12


@pytest.fixture(autouse=True)
def slurm_handlers_go() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.fixture
def requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A SLURM job with a fake ``scontrol``, and what that was told."""
    place, told = tmp_path / "bin", tmp_path / "told"
    place.mkdir()
    (place / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    (place / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=":")
    for name, value in (("NTASKS", "1"), ("JOB_ID", "77"), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    return lambda: told.read_text().splitlines() if told.exists() else []


def two_minibatches(model_folder: str, folder: Path, *callbacks: Callback, **settings: Any) -> Run:
    run = Run(model_folder, folder, *callbacks, max_steps=END, **settings)
    run.module = make_module(model_folder, update=sdp.UpdateConfig(num_minibatches=2))
    return run


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def version_in(checkpoint: Any) -> int:
    (state,) = [s for name, s in checkpoint["callbacks"].items() if "WeightSync" in name]
    return int(state["version"])


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda s: s.name)
def test_a_requeue_by_slurm_waits_for_the_end_of_the_step_and_loses_no_row(
    model_folder: str, tmp_path: Path, requeues: Callable[[], list[str]], signum: signal.Signals
) -> None:
    """The job is told twice in the step, and goes on until SLURM ends it."""
    cluster = SLURMEnvironment(requeue_signal=signum)
    tell = CallAt("step", lambda: [signal.raise_signal(signum) for _ in range(2)], step=MIDDLE)
    first = two_minibatches(model_folder, tmp_path, tell, plugins=[cluster])
    first.fit()
    assert requeues() == ["requeue 77"]
    assert saved_in(tmp_path) == ["hpc_ckpt_1.ckpt"]
    saved = load(tmp_path / "hpc_ckpt_1.ckpt")
    assert (version_in(saved), saved["global_step"]) == (3, 6)
    for name, value in first.recorder.weights[3].items():
        assert value.equal(saved["state_dict"][f"policy.{name}"])
    second = two_minibatches(model_folder, tmp_path, plugins=[cluster])
    second.fit()
    assert [step.batch.version for step in second.recorder.steps] == [3, 4, 5]
    assert second.rows == first.rows[6:] and len(set(first.rows)) == END


def test_a_requeue_while_the_trainer_waits_for_rollouts_comes_at_once(
    model_folder: str, tmp_path: Path, requeues: Callable[[], list[str]]
) -> None:
    """The engine answers only once the job is requeued."""

    class Waits(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            if self.version == 2 and not told.is_set():
                told.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if self.version == 2:
                while not requeues():
                    await asyncio.sleep(0)
            return await super().generate(request, sink)

    told = threading.Event()
    run = two_minibatches(model_folder, tmp_path, engine=Waits(), plugins=[SLURMEnvironment()])
    run.fit()
    assert requeues() == ["requeue 77"] and run.trainer.global_step == END
    assert version_in(load(tmp_path / "hpc_ckpt_1.ckpt")) == 2


def test_a_requeue_in_the_last_step_comes_at_the_end_of_the_fit(
    model_folder: str, tmp_path: Path, requeues: Callable[[], list[str]]
) -> None:
    tell = CallAt("step", lambda: signal.raise_signal(signal.SIGUSR1), step=END - 1)
    run = two_minibatches(model_folder, tmp_path, tell, plugins=[SLURMEnvironment()])
    run.fit()
    assert requeues() == ["requeue 77"]
    assert version_in(load(tmp_path / "hpc_ckpt_1.ckpt")) == END // 2


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_a_callback_saves_in_a_step_is_saved_at_its_end(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, weights_only: bool
) -> None:
    def save() -> None:
        run.trainer.save_checkpoint(tmp_path / "mine.ckpt", weights_only=weights_only)
        assert saved_in(tmp_path) == []

    run = two_minibatches(model_folder, tmp_path, CallAt("step", save, step=MIDDLE))
    run.fit()
    saved = load(tmp_path / "mine.ckpt")
    for name, value in run.recorder.weights[3].items():
        assert value.equal(saved["state_dict"][f"policy.{name}"])
    assert ("callbacks" in saved) is not weights_only
    assert "mine.ckpt' is saved when this step has ended" in caplog.text
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert version_in(load(tmp_path / "after.ckpt")) == END // 2


def test_nothing_is_saved_from_a_step_that_an_error_ends(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what waits for its end, nor by Lightning's saving on exceptions, nor afterwards."""

    class Asks(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == MIDDLE:
                trainer.save_checkpoint(tmp_path / "mine.ckpt")
                fail()

    saver = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True, every_n_epochs=1)
    sync = {"failing_callbacks": "raise"}
    run = two_minibatches(model_folder, tmp_path, Asks(), saver, sync=sync)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert saved_in(tmp_path) == []
    assert "mine.ckpt' was not saved: the fit has ended by an error" in caplog.text
    assert "on_exception of ModelCheckpoint failed" in caplog.text
    with pytest.raises(sdp.CheckpointError, match="ended in the middle of a step"):
        run.trainer.save_checkpoint(tmp_path / "after.ckpt")
