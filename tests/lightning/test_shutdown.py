"""How a run ends that does not end by itself: the error by name, nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import NamedWeights, PublishReport
from sdp_lightning.testing import FakeEngine
from support.trainers import (
    executor_of,
    make_data,
    make_module,
    make_rows,
    make_trainer,
    make_workflow,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def fit(folder: str, data: sdp.RolloutDataModule, *callbacks: Callback, **settings: Any) -> None:
    sync = sdp.WeightSyncCallback(failing_callbacks="raise")
    trainer = make_trainer(sync, *callbacks, **({"max_steps": 4} | settings))
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
