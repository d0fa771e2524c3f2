"""Two real vLLM servers of which one freezes, or dies: it costs time, not data, until none is left.

One pair for all tests, in their order; a server that is killed is started again once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import sdp_lightning as sdp
from sdp_lightning.engines.remote.backend import Call
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.remote.vllm import STREAM_INTERVAL, VLLMBackend
from sdp_lightning.engines.servers.managed import ManagedServers
from sdp_lightning.weights.protocol import Instruction
from support.real_vllm import (
    At,
    LongSamples,
    assert_exact,
    assert_gone,
    children_of,
    core,
    descendants_of,
    make_config,
    make_long_rows,
    num_sampled,
    save_model,
    wait_for,
    wait_until_sampling,
)
from support.rollouts import versions
from support.trainers import Judge, Recorder, make_module, make_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BUDGET = 240
RECOVER_S = 5.0
LOAD_S = 20.0  # a publish waits so long for a server that froze in it
OPTIONS = RemoteOptions(
    recover_s=RECOVER_S, health_interval_s=0.5, health_timeout_s=8.0, control_timeout_s=LOAD_S
)


class FaultyBackend(VLLMBackend):
    """Lets ``fault`` happen in the middle of one publish: after the pause, before a load."""

    fault: Callable[[], None] | None = None

    def load(self, instruction: Instruction) -> Call:
        fault, self.fault = self.fault, None
        if fault is not None:
            fault()
        return super().load(instruction)


class Pair:
    """Two servers, each of which can be frozen, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = save_model(folder / "model")
        self.servers = ManagedServers(make_config(self.model, folder / "logs", replicas=2))
        self.guards: list[int] = []
        self._again: list[ManagedServers] = []

    def start(self) -> None:
        self.servers.start()
        self.guards = self.servers.process_ids

    def close(self) -> None:
        for servers in (self.servers, *self._again):
            servers.close()

    @property
    def urls(self) -> list[str]:
        return self.servers.urls

    def processes_of(self, index: int) -> list[int]:
        found = [self.guards[index], *descendants_of(self.guards[index])]
        assert len(found) >= 4  # guard, API server, engine core, worker
        return found

    def signal_group(self, index: int, number: signal.Signals) -> None:
        for leader in children_of(self.guards[index]):
            os.killpg(leader, number)

    def kill(self, index: int) -> None:
        """The API server only: its engine and its worker have to notice."""
        for pid in children_of(self.guards[index]):
            os.kill(pid, signal.SIGKILL)

    def start_again(self, index: int) -> None:
        """On its port, as it was at first: with the weights of the model's folder."""
        assert_gone([self.guards[index]])
        port = int(self.urls[index].rpartition(":")[2])
        logs = self._folder / f"again-{len(self._again)}"
        logs.mkdir()
        config = make_config(self.model, logs, port=port, cores=(core(index),))
        self._again.append(ManagedServers(config))
        assert self._again[-1].start() == [self.urls[index]]
        self.guards[index] = self._again[-1].process_ids[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("vllm-pair"))
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


class Run:
    """A fit through a pair. It trains two layers of six and starts with weights of its own, so a
    server that comes back needs all weights, and then those that have changed.
    """

    def __init__(self, pair: Pair, engine: RemoteInfEngine, folder: Path) -> None:
        self.pair, self.engine = pair, engine
        self.model = save_model(folder / "trainer", seed=1)
        self.recorder = Recorder()
        self.evaluated: list[sdp.TrajectoryGroup] = []
        rollout = sdp.RolloutConfig(batch_size=4, max_head_lag=2, timeout_s=120.0)
        workflow = LongSamples(sdp.SamplingParams(max_new_tokens=BUDGET), group_size=2)
        self.data = sdp.RolloutDataModule(
            make_long_rows(64), workflow, engine=engine, rollout=rollout
        )

    def fit(self, actions: dict[int, Callable[[], None]], *, max_steps: int = 7) -> None:
        module = make_module(self.model, trainable=r"layers\.[14]\.")
        callbacks = sdp.WeightSyncCallback(), At(actions), self.recorder
        make_trainer(*callbacks, max_steps=max_steps).fit(module, self.data)

    def wait_until_one_serves(self) -> None:
        wait_for(lambda: self.engine.num_serving == 1)

    def sample_while(self, fault: Callable[[], None]) -> None:
        """While both servers sample, let ``fault`` happen; what they sampled ends all the same."""
        wait_for(lambda: self.engine.num_serving == 2)
        workflow = LongSamples(sdp.SamplingParams(max_new_tokens=480))
        with ThreadPoolExecutor(1) as pool:
            sampled = pool.submit(self.data.executor.evaluate, make_long_rows(8), workflow)
            for url in self.pair.urls:
                wait_until_sampling(url, 4)
            fault()
            groups = sampled.result()
        assert [sum(map(len, t.segments)) for g in groups for t in g.trajectories] == [480] * 8
        self.evaluated += groups

    def sample_on_both(self) -> None:
        """Wait until both serve, and sample on each of them before anything is published."""
        wait_for(lambda: self.engine.num_serving == 2)
        before = [num_sampled(url) for url in self.pair.urls]
        workflow = LongSamples(sdp.SamplingParams(max_new_tokens=40))
        rows = make_long_rows(24)  # the first 8 stay on the server that had them before
        self.evaluated += self.data.executor.evaluate(rows, workflow)
        after = [num_sampled(url) for url in self.pair.urls]
        assert all(new >= old + 40 for old, new in zip(before, after, strict=True))

    @property
    def evaluated_versions(self) -> list[set[int]]:
        return [set(versions(t)) for group in self.evaluated for t in group.trajectories]

    @property
    def num_continued(self) -> int:
        """Samples that went on elsewhere with the tokens that a lost server had sent."""
        groups = [*self.evaluated, *(g for step in self.recorder.steps for g in step.groups)]
        found = [versions(t) for group in groups for t in group.trajectories]
        return sum(len(set(ours)) < len(ours) for ours in found)

    def assert_each_row_once(self) -> None:
        steps = self.recorder.steps
        rows = [row for step in steps for row in step.row_ids]
        assert len(rows) == len(set(rows)) == 4 * len(steps)
        trajectories = [t for step in steps for g in step.groups for t in g.trajectories]
        assert {sum(map(len, t.segments)) for t in trajectories} == {BUDGET}
        trajectories += [t for group in self.evaluated for t in group.trajectories]
        assert_exact(Judge(self.model), self.recorder.weights, trajectories)


@pytest.mark.fault("hang", "generate")
@pytest.mark.fault("hang", "publish")
def test_a_server_that_freezes_is_left_and_serves_the_present_version_when_it_thaws(
    pair: Pair, tmp_path: Path
) -> None:
    """First while it samples, then in a publish: after its pause, before it has the weights."""
    backend = FaultyBackend()
    run = Run(pair, RemoteInfEngine(pair.urls, backend, options=OPTIONS), tmp_path)

    def freeze() -> None:
        pair.signal_group(0, signal.SIGSTOP)
        frozen_at = time.monotonic()
        run.wait_until_one_serves()
        allowed_s = OPTIONS.health_interval_s + OPTIONS.health_timeout_s
        assert time.monotonic() - frozen_at < allowed_s + 30.0

    def thaw() -> None:
        assert run.engine.num_serving == 1
        pair.signal_group(0, signal.SIGCONT)
        run.sample_on_both()

    def arm() -> None:
        backend.fault = lambda: pair.signal_group(0, signal.SIGSTOP)

    try:
        actions = {1: lambda: run.sample_while(freeze), 3: thaw, 4: arm, 6: thaw}
        run.fit(actions, max_steps=8)
    finally:
        pair.signal_group(0, signal.SIGCONT)
    assert run.recorder.engine_versions == list(range(9))
    assert run.engine.num_serving == 2
    assert run.evaluated_versions == [{1}] * 8 + [{3}] * 24 + [{6}] * 24
    published_s = [metrics["time/publish_s"] for metrics in run.recorder.metrics]
    assert max(published_s) == published_s[4] > LOAD_S
    assert run.num_continued == 0  # nothing was streamed, so all was sampled from its start
    run.assert_each_row_once()


@pytest.mark.fault("process killed", "generate")
def test_a_server_killed_while_it_streams_costs_no_row_and_serves_again_after_a_restart(
    pair: Pair, tmp_path: Path
) -> None:
    """Of what it sampled only the tokens are lost that it had not sent."""
    options = replace(OPTIONS, stream=True)
    run = Run(pair, RemoteInfEngine(pair.urls, VLLMBackend(), options=options), tmp_path)
    processes = pair.processes_of(0)

    def kill() -> None:
        wait_until_sampling(pair.urls[0], 4, num_tokens=4 * STREAM_INTERVAL)
        pair.kill(0)
        run.wait_until_one_serves()

    def start_again() -> None:
        assert run.engine.num_serving == 1
        assert_gone(processes)
        pair.start_again(0)
        run.sample_on_both()

    run.fit({1: lambda: run.sample_while(kill), 4: start_again})
    assert run.recorder.engine_versions == list(range(8))
    assert run.engine.num_serving == 2
    assert run.evaluated_versions == [{1}] * 8 + [{4}] * 24
    assert run.num_continued > 0
    run.assert_each_row_once()


@pytest.mark.fault("process killed", "publish")
def test_a_server_killed_during_a_publish_costs_no_row_and_the_last_one_is_a_named_error(
    pair: Pair, tmp_path: Path
) -> None:
    backend = FaultyBackend()
    run = Run(pair, RemoteInfEngine(pair.servers, backend, options=OPTIONS), tmp_path)
    processes = [*pair.processes_of(0), *pair.processes_of(1)]
    killed_at: list[float] = []

    def arm() -> None:
        backend.fault = lambda: pair.kill(0)

    def kill_last() -> None:
        assert run.engine.num_serving == 1
        killed_at.append(time.monotonic())
        pair.kill(1)

    with pytest.raises(sdp.EngineError, match=r"servers are left|no server has been left"):
        run.fit({1: arm, 4: kill_last})
    assert time.monotonic() - killed_at[0] < RECOVER_S + 100
    assert run.recorder.engine_versions[:5] == list(range(5))
    run.recorder.steps = run.recorder.steps[:5]
    run.assert_each_row_once()
    assert_gone(processes)
