"""A hang of the trainer's thread is ended, and its stacks are shown; waits are no hangs."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import sdp_lightning as sdp
from sdp_lightning.lightning import stop_request, watchdog
from sdp_lightning.testing import FakeEngine
from support.fork_server import ForkServer
from support.forked_processes import Ended, forked
from support.paths import TESTS
from support.trainers import make_data, make_module, make_rows, make_trainer

LIMIT_S = 2.0  # by a clock that runs only while something is to seem hung
DEADLINE_S = 200.0

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

SCRIPT = """
import sys, threading, ctypes, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from lightning.pytorch.loggers import CSVLogger
from support.trainers import make_data, make_module, make_trainer
import sdp_lightning as sdp
from sdp_lightning.lightning import stop_request, watchdog
from sdp_lightning.testing import FakeEngine

hung_at = []  # before it hangs a run has all the time that it needs
def clock(): return time.monotonic() - hung_at[0] if hung_at else 0.0
stop_request.time = watchdog.time = SimpleNamespace(monotonic=clock)

def hang(): hung_at.append(time.monotonic())

def sleep():
    hang()
    threading.Event().wait()

def swallow():
    while True:
        try:
            sleep()
        except Exception:
            print("SWALLOWED", flush=True)

def hold_the_lock():  # a C call that keeps the interpreter's lock
    hang()
    print("HOLDS", flush=True)
    ctypes.PyDLL(None).sleep(600)

class Hangs(sdp.SegmentWisePPOModule):
    def training_step(self, batch, batch_idx):
        if batch_idx == 0 and {how!r} != "log_metrics":
            {how}()
        super().training_step(batch, batch_idx)

class Logger(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if {how!r} == "log_metrics" and step:
            sleep()
        super().log_metrics(metrics, step)

data = make_data(engine=FakeEngine())
dog = sdp.Watchdog({limit}, patience_s={patience})
trainer = make_trainer(
    sdp.WeightSyncCallback(), dog, max_steps=10**6, logger=Logger({logs!r}), log_every_n_steps=1
)
trainer.fit(Hangs({folder!r}), data)
print("ENDED", flush=True)
"""


@pytest.fixture(scope="module")
def ended(
    fork_server: ForkServer, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """Runs at once that hang in a training step, each in its own way, or in a logger."""
    logs = str(tmp_path_factory.mktemp("logs"))
    scripts = {
        how: SCRIPT.format(
            tests=str(TESTS),
            folder=model_folder,
            how=how,
            limit=LIMIT_S,
            patience=DEADLINE_S if how in ("sleep", "log_metrics") else 1.0,
            logs=logs,
        )
        for how in ("sleep", "swallow", "hold_the_lock", "log_metrics")
    }
    with forked(fork_server, scripts, tmp_path_factory.mktemp("errors")) as forks:
        return forks.wait(DEADLINE_S)


@pytest.mark.parametrize("how", ["sleep", "swallow", "hold_the_lock"])
@pytest.mark.fault("hang", "train step")
def test_a_hung_step_is_ended_with_the_stacks_of_all_threads(
    ended: dict[str, Ended], how: str
) -> None:
    result = ended[how]
    assert result.returncode == 1, result.stderr
    assert "ENDED" not in result.stdout
    assert f"in {how}" in result.stderr
    assert "(most recent call first)" in result.stderr
    assert "in training_step" in result.stderr
    assert "runner.py" in result.stderr  # the rollout thread's stack


def test_a_run_that_is_asked_ends_in_order_with_an_error_that_says_why(
    ended: dict[str, Ended],
) -> None:
    """Before its patience is over: the error is what ended it."""
    stderr = ended["sleep"].stderr
    assert "HangError: the trainer's thread showed no sign of life for 2 s" in stderr
    assert re.search(r"no sign of life for \d+\.\d s; stacks of all threads", stderr)


@pytest.mark.fault("hang", "observer")
def test_a_logger_that_hangs_is_ended_and_is_not_set_aside_as_one_that_fails(
    ended: dict[str, Ended],
) -> None:
    result = ended["log_metrics"]
    assert result.returncode == 1 and "ENDED" not in result.stdout
    assert "HangError: the trainer's thread showed no sign of life for 2 s" in result.stderr
    assert "in log_metrics" in result.stderr and "set aside" not in result.stderr


def test_one_that_does_not_end_when_asked_is_ended_all_the_same(
    ended: dict[str, Ended],
) -> None:
    assert "SWALLOWED" in ended["swallow"].stdout
    assert "Timeout (0:00:01" in ended["swallow"].stderr


def test_one_that_holds_the_interpreters_lock_cannot_be_asked_and_is_ended(
    ended: dict[str, Ended],
) -> None:
    assert "HOLDS" in ended["hold_the_lock"].stdout
    assert "Timeout" in ended["hold_the_lock"].stderr


# What is no hang ----------------------------------------------------------------------------------


class Clock:
    """Stands still but for pauses, so that a busy machine is no hang."""

    def __init__(self) -> None:
        self._now, self._reads = 0.0, Counter[str]()
        self._read = threading.Condition()

    def monotonic(self) -> float:
        with self._read:
            self._reads[threading.current_thread().name] += 1
            self._read.notify_all()
            return self._now

    def pause(self, limits: float = 1.3, *, shows_life: bool = False) -> None:
        """Let more time pass than the watchdog's limit, which looks all the while.

        Args:
            limits: how many limits.
            shows_life: whether the watched thread looks, too, and so shows signs of life.
        """
        threads = ["sdp-watchdog"] + ["MainThread"] * shows_life
        for _ in range(round(4 * limits)):
            with self._read:
                self._now += LIMIT_S / 4
                seen = self._reads.copy()
                for thread in threads:
                    is_there = self._read.wait_for(
                        lambda thread=thread, seen=seen: self._reads[thread] > seen[thread],
                        DEADLINE_S,
                    )
                    assert is_there, f"{thread} does not look at the clock"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (watchdog, stop_request):
        monkeypatch.setattr(module, "time", clock)
    return clock


def fit(
    folder: str, data: sdp.RolloutDataModule, *callbacks: Callback, **settings: Any
) -> L.Trainer:
    dog = sdp.Watchdog(LIMIT_S, checkpoint_timeout_s=DEADLINE_S, patience_s=DEADLINE_S)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), dog, *callbacks, **({"max_steps": 2} | settings)
    )
    trainer.fit(make_module(folder), data)
    return trainer


class SlowReward:
    def __init__(self, clock: Clock) -> None:
        self.num_slow, self._clock, self._lock = 0, clock, threading.Lock()

    def __call__(self, completion: str, row: Any) -> float:
        with self._lock:
            if row["id"] == "row0" and not self.num_slow:
                self._clock.pause(shows_life=True)
                self.num_slow += 1
        return float(len(completion))


@pytest.mark.parametrize("where", ["prompts", "val_prompts"])
@pytest.mark.fault("slow", "reward")
def test_a_wait_for_rollouts_or_an_evaluation_is_no_hang(
    model_folder: str, clock: Clock, where: str
) -> None:
    reward = SlowReward(clock)
    workflow = sdp.RLVRWorkflow(reward, group_size=2, sampling=sdp.SamplingParams(max_new_tokens=4))
    slow, others = make_rows(1), make_rows(9)[1:]
    rows, val = (slow, None) if where == "prompts" else (others, slow)
    data = make_data(workflow, rows=rows, val_prompts=val, engine=FakeEngine())
    trainer = fit(model_folder, data, max_steps=1, num_sanity_val_steps=0)
    assert trainer.state.finished and trainer.global_step == 1
    assert reward.num_slow == 1, "a sample took longer"


class SlowDisk(TorchCheckpointIO):
    def __init__(self, clock: Clock) -> None:
        self.num_saved, self._clock = 0, clock

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._clock.pause()
        self.num_saved += 1
        super().save_checkpoint(*args, **kwargs)


class LooksAfterwards(Callback):
    """Shows no sign of life for longer than the watchdog waits between two looks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_epoch_end(self, *_: Any) -> None:
        self._clock.pause(0.5)


@pytest.mark.fault("slow", "checkpoint")
def test_writing_a_checkpoint_is_no_hang(model_folder: str, clock: Clock, tmp_path: Path) -> None:
    """Fault: the time of the writing counts again once it has ended."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    disk, last = SlowDisk(clock), LooksAfterwards(clock)
    settings: dict[str, Any] = {"enable_checkpointing": True, "plugins": [disk]}
    data = make_data(engine=FakeEngine())
    trainer = fit(model_folder, data, saver, last, max_steps=1, **settings)
    assert trainer.state.finished and disk.num_saved == 1
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


class SlowStep(Callback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self._clock.pause(3.0)


def test_a_slow_step_is_a_hang_also_in_this_process(
    model_folder: str, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the tests above would see if their pauses were taken for hangs."""
    with pytest.raises(sdp.SDPError, match="no sign of life for 2 s"):
        fit(model_folder, make_data(engine=FakeEngine()), SlowStep(clock))
    assert "in on_before_optimizer_step" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["timeout_s", "checkpoint_timeout_s", "patience_s"])
def test_times_must_be_positive(name: str) -> None:
    with pytest.raises(sdp.ConfigError, match=f"{name}=0"):
        sdp.Watchdog(**({"timeout_s": 1.0} | {name: 0.0}))
