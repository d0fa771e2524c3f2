"""Two real vLLM servers, and ``kill -9``: it costs time, not data, until the last one is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from fitting import (
    Judge,
    Recorder,
    executor_of,
    make_module,
    make_rows,
    make_trainer,
    make_workflow,
)
from lightning.pytorch.callbacks import Callback
from real_vllm import (
    assert_exact,
    assert_gone,
    children_of,
    descendants_of,
    make_config,
    num_running,
    save_model,
    wait_for,
)
from rolling import assert_conserved

import sdp_lightning as sdp
from sdp_lightning.engines.backend import Call
from sdp_lightning.engines.options import RemoteOptions
from sdp_lightning.engines.remote import RemoteInfEngine
from sdp_lightning.engines.server import ManagedServers
from sdp_lightning.engines.vllm import VLLMBackend

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RECOVER_S = 5.0
EOS = 1  # of the tiny tokenizer


class KillingBackend(VLLMBackend):
    """Runs ``kill`` in the middle of one publish: after the pause, before the first load."""

    kill: Callable[[], None] | None = None

    def load_folder(self, folder: str) -> Call:
        kill, self.kill = self.kill, None
        if kill is not None:
            kill()
        return super().load_folder(folder)


class At(Callback):
    """Calls something at the start of the step of one version, and checks the ledger after each."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._actions = actions

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._actions.get(batch.version, lambda: None)()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        assert_conserved(executor_of(trainer))


class Pair:
    """Two managed servers with an engine, and the means to kill them."""

    def __init__(self, folder: Path) -> None:
        self.model = save_model(folder / "model")
        self.servers = ManagedServers(make_config(self.model, folder / "logs", replicas=2))
        self.backend = KillingBackend()
        options = RemoteOptions(recover_s=RECOVER_S, health_interval_s=0.5)
        self.engine = RemoteInfEngine(self.servers, self.backend, options=options)
        self.processes: list[int] = []

    def remember(self) -> None:
        guards = self.servers.process_ids
        self.processes = [*guards, *(p for guard in guards for p in descendants_of(guard))]
        assert len(self.processes) >= 8  # guard, API server, engine core, worker; twice

    def kill(self, index: int) -> None:
        for pid in children_of(self.servers.process_ids[index]):
            os.kill(pid, signal.SIGKILL)

    def kill_while_it_samples(self) -> None:
        wait_for(lambda: all(num_running(url) >= 1 for url in self.servers.urls))
        self.kill(0)

    def fit(self, *actions: tuple[int, Callable[[], None]], max_steps: int = 7) -> Recorder:
        rollout = sdp.RolloutConfig(batch_size=4, max_head_lag=2, timeout_s=60.0)
        workflow = make_workflow(max_new_tokens=120)
        data = sdp.RolloutDataModule(make_rows(64), workflow, engine=self.engine, rollout=rollout)
        recorder = Recorder()
        at = At({0: self.remember, **dict(actions)})
        trainer = make_trainer(sdp.WeightSyncCallback(), at, recorder, max_steps=max_steps)
        try:
            trainer.fit(make_module(self.model), data)
        finally:
            self.recorder = recorder
        return recorder


def assert_each_row_once(recorder: Recorder, model: str) -> None:
    rows = [row for step in recorder.steps for row in step.row_ids]
    assert len(rows) == len(set(rows)) == 4 * len(recorder.steps)
    trajectories = [t for step in recorder.steps for g in step.groups for t in g.trajectories]
    for trajectory in trajectories:
        stopped = trajectory.finish_reason == "stop" and trajectory.token_ids[-1] == EOS
        assert sum(map(len, trajectory.segments)) == 120 or stopped
    assert_exact(Judge(model), recorder.weights, trajectories)


def test_a_server_killed_while_it_samples_costs_no_row(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    recorder = pair.fit((2, pair.kill_while_it_samples))
    assert recorder.engine_versions == list(range(8))
    assert_each_row_once(recorder, pair.model)
    assert_gone(pair.processes)


def test_a_server_killed_during_a_publish_costs_no_row_and_the_last_one_is_a_named_error(
    tmp_path: Path,
) -> None:
    pair = Pair(tmp_path)
    killed_at: list[float] = []

    def arm() -> None:
        pair.backend.kill = lambda: pair.kill(0)

    def kill_last() -> None:
        assert pair.engine.num_serving == 1
        killed_at.append(time.monotonic())
        pair.kill(1)

    with pytest.raises(sdp.EngineError, match=r"servers are left|no server has been left"):
        pair.fit((1, arm), (4, kill_last))
    assert time.monotonic() - killed_at[0] < RECOVER_S + 40
    recorder = pair.recorder
    assert recorder.engine_versions[:5] == list(range(5))
    recorder.steps = recorder.steps[:5]
    assert_each_row_once(recorder, pair.model)
    assert_gone(pair.processes)
