"""How a run ends that does not end by itself: the error by name, nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import NamedWeights, PublishReport
from sdp_lightning.testing import FakeEngine
from support.forked_processes import Ended, forked
from support.paths import TESTS
from support.trainers import (
    executor_of,
    make_data,
    make_module,
    make_rows,
    make_trainer,
    make_workflow,
)

DEADLINE_S = 200


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(DEADLINE_S)  # one that calls a reward ends when the reward does
        assert not thread.is_alive(), thread


def fit(folder: str, data: sdp.RolloutDataModule, *callbacks: Callback, **settings: Any) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), *callbacks, **({"max_steps": 4} | settings))
    trainer.fit(make_module(folder), data)


def assert_closed(data: sdp.RolloutDataModule, engine: Any) -> None:
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = data.executor
    with pytest.raises(sdp.EngineError, match="closed"):
        engine.update_weights([], 99, reset=True)


def fail_third(completion: str, row: Any) -> float:
    if row["id"] == "row2":
        raise ZeroDivisionError("third row")
    return 1.0


class FailingWorkflow(sdp.RolloutWorkflow):
    sampling = sdp.SamplingParams(max_new_tokens=4)

    async def run(self, row: Any, session: Any) -> Any:
        raise LookupError("no such page")


@pytest.mark.parametrize(
    ("workflow", "cause", "message"),
    [
        (make_workflow(fail_third), ZeroDivisionError, r"'row2'.*third row"),
        (FailingWorkflow(), LookupError, r"'row0'.*no such page"),
    ],
    ids=["reward", "workflow"],
)
@pytest.mark.parametrize("embedded", [False, True], ids=["fake", "embedded"])
@pytest.mark.fault("exception", "reward", only="reward")
@pytest.mark.fault("exception", "generate", only="workflow")
def test_an_error_in_a_rollout_reaches_the_caller_with_row_and_cause(
    model_folder: str,
    workflow: sdp.RolloutWorkflow,
    cause: type[Exception],
    message: str,
    embedded: bool,
) -> None:
    engine = EmbeddedEngine(model_folder, device="cpu") if embedded else FakeEngine()
    data = make_data(workflow, engine=engine, shuffle=False)
    with pytest.raises(sdp.RolloutError, match=message) as info:
        fit(model_folder, data)
    assert isinstance(info.value.__cause__, cause)
    assert_closed(data, engine)


class CallAt(Callback):
    """Calls a function at one hook of the second batch."""

    def __init__(self, hook: str, function: Callable[[L.Trainer], None]) -> None:
        self._hook, self._function = hook, function

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._hook == "start" and batch_idx == 1:
            self._function(trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if self._hook == "step" and trainer.global_step == 1:
            self._function(trainer)


@pytest.mark.fault("exception", "generate")
def test_an_engine_that_fails_ends_the_run(model_folder: str) -> None:
    engine = FakeEngine()
    data = make_data(engine=engine)
    call = CallAt("start", lambda trainer: engine.fail("the GPU fell off the bus"))
    with pytest.raises(sdp.SDPError, match="the GPU fell off the bus"):
        fit(model_folder, data, call)
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = data.executor


class BrokenTransfer(FakeEngine):
    """Fails when it is given version 2."""

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        if version == 2:
            raise sdp.EngineError("the cable was cut")
        return super().update_weights(weights, version, reset=reset)


@pytest.mark.fault("exception", "publish")
def test_a_publish_that_fails_ends_the_run_at_the_version_before(model_folder: str) -> None:
    engine = BrokenTransfer()
    data = make_data(engine=engine)
    with pytest.raises(sdp.EngineError, match="the cable was cut"):
        fit(model_folder, data)
    assert engine.version == 1
    assert_closed(data, engine)


def interrupt(trainer: L.Trainer) -> None:
    raise KeyboardInterrupt


def divide(trainer: L.Trainer) -> None:
    raise ZeroDivisionError("in a step")


@pytest.mark.parametrize("hook", ["start", "step"])
@pytest.mark.parametrize("embedded", [False, True], ids=["fake", "embedded"])
@pytest.mark.fault("exception", "train step")
def test_an_error_in_a_training_step_passes_through(
    model_folder: str, hook: str, embedded: bool
) -> None:
    engine = EmbeddedEngine(model_folder, device="cpu") if embedded else FakeEngine()
    data = make_data(engine=engine)
    with pytest.raises(ZeroDivisionError, match="in a step"):
        fit(model_folder, data, CallAt(hook, divide))
    assert_closed(data, engine)


@pytest.fixture
def restored_sigint() -> Iterator[None]:
    """Lightning ignores further Ctrl-C once it saw one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("restored_sigint")
def test_an_interrupt_ends_in_system_exit_and_closes_everything(model_folder: str) -> None:
    engine = EmbeddedEngine(model_folder, device="cpu")
    data = make_data(engine=engine)
    with pytest.raises(SystemExit) as info:
        fit(model_folder, data, CallAt("step", interrupt))
    assert info.value.code == 1
    assert_closed(data, engine)


def test_settings_that_are_refused_late_leave_nothing_behind(model_folder: str) -> None:
    """The module checks ``max_steps`` after the engine has started."""
    engine = EmbeddedEngine(model_folder, device="cpu")
    data = make_data(engine=engine)
    module = make_module(model_folder, update=sdp.UpdateConfig(num_minibatches=2))
    with pytest.raises(sdp.ConfigError, match="no multiple"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=3).fit(module, data)
    assert_closed(data, engine)


class CannotStart(FakeEngine):
    def start(self) -> None:
        raise sdp.EngineError("no such model")


def test_an_engine_that_cannot_start_is_closed(model_folder: str) -> None:
    engine = CannotStart()
    data = make_data(engine=engine)
    with pytest.raises(sdp.EngineError, match="no such model"):
        fit(model_folder, data)
    assert_closed(data, engine)


def test_an_error_while_validating_names_the_row(model_folder: str) -> None:
    engine = FakeEngine()
    data = make_data(make_workflow(fail_third), engine=engine, val_prompts=make_rows(3)[2:])
    with pytest.raises(sdp.RolloutError, match=r"evaluating row 'row2' failed.*third row"):
        fit(model_folder, data)
    assert_closed(data, engine)


@pytest.mark.fault("hang", "generate")
def test_a_batch_that_never_comes_is_a_timeout_that_says_why(model_folder: str) -> None:
    engine = FakeEngine(manual=True)
    data = make_data(engine=engine, timeout_s=1.5)
    with pytest.raises(sdp.RolloutTimeout, match=r"waited 1.5 s for 2 groups: 0 are ready, 6 run"):
        fit(model_folder, data)
    assert_closed(data, engine)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_sigterm_ends_an_evaluation_that_waits(model_folder: str, stage: str) -> None:
    """Its engine never answers, and the deadline is far away."""
    told = threading.Event()

    class Terminate(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            if not told.is_set():
                told.set()
                os.kill(os.getpid(), signal.SIGTERM)
            return await super().generate(request, sink)

    data = make_data(engine=Terminate(manual=True), val_prompts=make_rows(1), timeout_s=1e6)
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1, num_sanity_val_steps=1)
    with pytest.raises(SystemExit) as ended:
        getattr(trainer, stage)(make_module(model_folder), data)
    assert ended.value.code == 128 + signal.SIGTERM


def test_close_is_idempotent(model_folder: str) -> None:
    engine = FakeEngine()
    data = make_data(engine=engine)

    def close_twice(trainer: L.Trainer) -> None:
        assert executor_of(trainer) is data.executor
        data.close()
        data.close()
        raise ZeroDivisionError("in a step")

    with pytest.raises(ZeroDivisionError):
        fit(model_folder, data, CallAt("start", close_twice))
    assert_closed(data, engine)


# Signals, in a process of their own ---------------------------------------------------------------

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from support.trainers import make_data, make_module, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine

class Mark(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            print("MARK", flush=True)

class Stalls(FakeEngine):
    async def generate(self, request, sink):
        if self.version == 2:
            print("MARK", flush=True)
            self.manual = True
        return await super().generate(request, sink)

data = make_data(engine=Stalls()) if {waiting} else make_data()
callbacks = [sdp.WeightSyncCallback(), ModelCheckpoint({saved!r}, every_n_train_steps=10**6)]
callbacks += [] if {waiting} else [Mark()]
trainer = make_trainer(*callbacks, max_steps=10**8, enable_checkpointing=True)
trainer.fit(make_module({folder!r}), data)
print("ENDED", flush=True)
"""


CASES = [f"{name} {where}" for name in ("SIGINT", "SIGTERM") for where in ("training", "waiting")]


@dataclass(frozen=True)
class Stopped(Ended):
    saved: list[Path]


@pytest.fixture(scope="module")
def stopped(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stopped]:
    """Four runs at once, each sent its signal once it has printed its mark."""
    folders = {case: tmp_path_factory.mktemp("saved") for case in CASES}
    scripts = {
        case: SCRIPT.format(
            tests=str(TESTS),
            folder=model_folder,
            waiting=case.endswith("waiting"),
            saved=str(folders[case]),
        )
        for case in CASES
    }
    with forked(scripts, tmp_path_factory.mktemp("errors")) as forks:
        for case, run in forks.running.items():
            for line in run.stdout:
                if line.startswith("MARK"):
                    os.kill(run.pid, signal.Signals[case.split()[0]])
                    break
        ended = forks.wait(DEADLINE_S)
        numbers = [run.pid for run in forks.running.values()]
    for number in numbers:
        with pytest.raises(ProcessLookupError):  # no child is left in its session
            os.killpg(number, 0)
    shared = os.listdir("/dev/shm")
    assert not [name for name in shared if any(str(number) in name for number in numbers)]
    return {
        case: Stopped(one.returncode, one.stdout, one.stderr, [*folders[case].iterdir()])
        for case, one in ended.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_signal_leaves_one_whole_checkpoint_and_says_where(
    stopped: dict[str, Stopped], case: str
) -> None:
    (path,) = stopped[case].saved
    assert f"go on with ckpt_path='{path}'" in stopped[case].stderr
    state = torch.load(path, weights_only=True)
    version = state["callbacks"]["WeightSyncCallback"]["version"]
    assert version == state["global_step"]
    assert version >= (2 if case.endswith("waiting") else 3)
    assert path.name == f"last-stopped-step={version}.ckpt"


@pytest.mark.parametrize("where", ["training", "waiting"])
def test_ctrl_c_ends_a_run_without_a_traceback(stopped: dict[str, Stopped], where: str) -> None:
    result = stopped[f"SIGINT {where}"]
    assert result.returncode == 1, result.stderr
    assert "ENDED" not in result.stdout
    assert "Detected KeyboardInterrupt" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("where", ["training", "waiting"])
def test_sigterm_ends_a_run_and_is_not_reported_as_success(
    stopped: dict[str, Stopped], where: str
) -> None:
    result = stopped[f"SIGTERM {where}"]
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "ENDED" not in result.stdout
    assert "Received SIGTERM" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
