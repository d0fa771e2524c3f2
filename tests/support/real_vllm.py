"""Helpers of the tests with real vLLM servers: where vLLM is, a model for it, what servers do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.engines.servers.managed import ServerConfig
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from sdp_lightning.types import Row
from sdp_lightning.workflows.workflow import RolloutSession
from support.paths import ROOT
from support.rollouts import assert_conserved, make_executor, versions, wait_until
from support.trainers import Judge, executor_of

DEADLINE_S = 120.0
SAMPLING_S = 400.0  # for 40,000 tokens, half a minute's work of quiet cores
BESIDE = ROOT / ".venv-vllm" / "bin" / "python"
PYTHON = Path(os.environ.get("SDP_VLLM_PYTHON", BESIDE))
TOLERANCE = 1e-4  # nats, between vLLM's float32 and transformers'


def require_vllm() -> str:
    """The interpreter that has vLLM; without one the test is skipped, but fails in CI."""
    if PYTHON.is_file():
        return str(PYTHON)
    reason = f"{PYTHON} is not there: run `make setup-vllm`"
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(reason)
    pytest.fail(reason)


def make_model(seed: int = 0) -> Any:
    """Heads of 32, the least that vLLM's CPU kernels can do; tied embeddings; room to be long."""
    model = tiny_model(hidden_size=128, num_layers=6, seed=seed)
    model.config.max_position_embeddings = 1024
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(0.5)  # logits of some nats, so that float32 is exact to 1e-5
    return model


def save_model(folder: Path, *, seed: int = 0) -> str:
    """A model and its tokenizer, as transformers saves them."""
    with quiet_transformers():
        make_model(seed).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_config(model: str, logs: Path, *, replicas: int = 1, **settings: Any) -> ServerConfig:
    cores = tuple(core(index) for index in range(replicas))
    defaults: dict[str, Any] = {
        "replicas": replicas,
        "python": require_vllm(),
        "devices": ("cpu",),
        "max_model_len": 1024,
        "cores": cores if replicas > 1 else None,
        "log_folder": str(logs),
        "startup_timeout_s": 400.0,
    }
    return ServerConfig(model, **(defaults | settings))


def core(index: int) -> str:
    """A core of its own for every server, while there are enough."""
    available = sorted(os.sched_getaffinity(0))
    return str(available[index % len(available)])


def engine_url(server_url: str) -> str:
    return server_url.replace("http://", "vllm://")


class LongSamples(sdp.RolloutWorkflow):
    """Completions of a row, each to its whole budget, with rewards that differ."""

    def __init__(self, sampling: sdp.SamplingParams, *, group_size: int = 1) -> None:
        self._sampling, self._group_size = sampling, group_size

    @property
    def sampling(self) -> sdp.SamplingParams:
        return self._sampling

    async def run(self, row: Row, session: RolloutSession) -> Sequence[sdp.Trajectory]:
        samples = [self._sample(row, session) for _ in range(self._group_size)]
        return await asyncio.gather(*samples)

    async def _sample(self, row: Row, session: RolloutSession) -> sdp.Trajectory:
        episode = session.open()
        episode.add_context(row["tokens"])
        await episode.generate(self._sampling)
        return episode.finish(int(episode.sampled_token_ids.sum()) % 97 / 97)


def make_long_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row{i}", "tokens": [5, 6 + i % 40, 6 + i // 40]} for i in range(count)]


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


Updates = Sequence[Iterable[tuple[str, Tensor]]]
Weights = Mapping[int, Mapping[str, Tensor]]  # of each version


_TRIES = 8


def generate_across(
    server_url: str,
    updates: Updates,
    *,
    num_requests: int = 16,
    budget: int = 960,
    temperature: float = 1.0,
    **options: Any,
) -> list[sdp.Trajectory]:
    """Publish ``updates`` one after another while ``num_requests`` requests are in flight.

    None of them is lost or doubled, each gets its whole budget, and at least 8 of them live under
    both sides of every publish; what they sampled is returned. Where other programs have the cores,
    all may have ended before one is published: then it is tried again.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(_AllEnded):
            return _generate_across(server_url, updates, num_requests, budget, temperature, options)
    raise AssertionError(f"{_TRIES} times all requests ended before the last publish")


class _AllEnded(Exception):
    pass


def _generate_across(
    server_url: str,
    updates: Updates,
    num_requests: int,
    budget: int,
    temperature: float,
    options: Mapping[str, Any],
) -> list[sdp.Trajectory]:
    def have_ended() -> bool:
        return executor.stat.pending == num_requests  # none was lost

    sampling = sdp.SamplingParams(max_new_tokens=budget, temperature=temperature)
    rows = make_long_rows(num_requests)
    engine = sdp.connect_engine(engine_url(server_url), kv_on_update="recompute", **options)
    engine.start()
    executor = make_executor(
        engine,
        LongSamples(sampling),
        rows=rows,
        num_epochs=1,
        batch_size=num_requests,
        max_head_lag=len(updates) - 1,
        max_concurrent=num_requests,
        drain_s=DEADLINE_S,
    )
    try:
        executor.publish(updates[0], 0, reset=True)
        executor.resume()
        for version in range(1, len(updates)):
            wait_until_sampling(server_url, num_requests, have_ended=have_ended)
            executor.publish(updates[version], version)
        wait_until(executor, lambda: executor.stat.running == 0, within_s=SAMPLING_S)
        live = executor.registry.snapshot()
        assert_conserved(executor)
        stat = executor.stat
    finally:
        executor.close()
        engine.close()
    assert (stat.submitted, stat.pending, stat.dropped) == (num_requests, num_requests, 0)
    assert sorted(x.row.row_id for x in live) == sorted(row["id"] for row in rows)
    trajectories = [t for x in live if x.finished is not None for t in x.finished.trajectories]
    assert [sum(map(len, t.segments)) for t in trajectories] == [budget] * num_requests
    assert len({tuple(t.token_ids[3:]) for t in trajectories}) == num_requests
    for version in range(1, len(updates)):
        across = [t for t in trajectories if versions(t)[0] < version <= versions(t)[-1]]
        assert len(across) >= 8, (version, [versions(t) for t in trajectories])
    return trajectories


def assert_exact(judge: Judge, weights: Weights, trajectories: Iterable[sdp.Trajectory]) -> int:
    """Every segment has its version's log-probs; returns how many trajectories mix versions."""
    num_mixed = 0
    for trajectory in trajectories:
        segments = trajectory.segments
        found = [segment.version for segment in segments]
        assert found == sorted(found)
        num_mixed += len(set(found)) > 1
        for version in set(found):
            expected = judge.segment_logprobs(weights[version], trajectory)
            for segment, logprobs in zip(segments, expected, strict=True):
                if segment.version == version:
                    error = (logprobs - logprobs.new_tensor(segment.logprobs)).abs().max()
                    assert error < TOLERANCE, (version, found, float(error))
    return num_mixed


def read_metrics(url: str, *names: str) -> list[float]:
    """The sum of each over its labels, from vLLM's own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return [
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
        for name in names
    ]


def num_sampled(url: str) -> float:
    return read_metrics(url, "vllm:generation_tokens_total")[0]


def wait_until_sampling(
    url: str,
    num_requests: int,
    *,
    num_tokens: int = 1,
    have_ended: Callable[[], bool] = lambda: False,
) -> None:
    """Until half of ``num_requests`` run, and ``num_tokens`` times as many are sampled then."""
    names = "vllm:num_requests_running", "vllm:generation_tokens_total"

    def are_running(enough: float = 0.0) -> bool:
        if have_ended():
            raise _AllEnded
        running, sampled = read_metrics(url, *names)
        return running >= num_requests // 2 and sampled >= enough

    wait_for(are_running, "half of the requests running")
    enough = num_sampled(url) + num_requests * num_tokens  # by those that run now, not by the first
    wait_for(lambda: are_running(enough), "half of the requests sampling")


def wait_for(condition: Callable[[], bool], what: str = "it") -> None:
    """Ask until it is true: a server cannot be told to call back."""
    never, deadline = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        never.wait(0.01)


def children_of(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants_of(pid: int) -> list[int]:
    return [p for child in children_of(pid) for p in (child, *descendants_of(child))]


def assert_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ended, f"process {pid} is still there"
        finally:
            os.close(descriptor)
