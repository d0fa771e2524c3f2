"""Helpers of the tests with real vLLM servers: where vLLM is, a model for it, what servers do."""

from __future__ import annotations

import os
import select
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Judge
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.engines.server import ServerConfig
from sdp_lightning.loading import quiet_transformers
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from sdp_lightning.workflows.base import RolloutSession, Row

DEADLINE_S = 120.0
BESIDE = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
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
    """Heads of 32, the least that vLLM's CPU kernels can do; tied embeddings."""
    model = tiny_model(hidden_size=128, num_layers=6, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(0.5)  # logits of some nats, so that float32 is exact to 1e-5
    return model


def save_model(folder: Path) -> str:
    """A model and its tokenizer, as transformers saves them."""
    with quiet_transformers():
        make_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_config(model: str, logs: Path, *, replicas: int = 1) -> ServerConfig:
    available = sorted(os.sched_getaffinity(0))
    cores = tuple(str(available[i % len(available)]) for i in range(replicas))
    return ServerConfig(
        model,
        replicas=replicas,
        python=require_vllm(),
        devices=("cpu",),
        max_model_len=512,
        cores=cores if replicas > 1 else None,
        log_folder=str(logs),
        startup_timeout_s=400.0,
    )


class LongSamples(sdp.RolloutWorkflow):
    """One completion of a row, to its whole budget."""

    def __init__(self, sampling: sdp.SamplingParams) -> None:
        self._sampling = sampling

    @property
    def sampling(self) -> sdp.SamplingParams:
        return self._sampling

    async def run(self, row: Row, session: RolloutSession) -> Sequence[sdp.Trajectory]:
        episode = session.open()
        episode.add_context(row["tokens"])
        await episode.generate(self._sampling)
        return [episode.finish(reward=1.0)]


def assert_exact(
    judge: Judge, weights: dict[int, dict[str, Tensor]], trajectories: Iterable[sdp.Trajectory]
) -> int:
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


def read_metric(url: str, name: str) -> float:
    """The sum of ``name`` over its labels, from vLLM's own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def num_sampled(url: str) -> float:
    return read_metric(url, "vllm:generation_tokens_total")


def num_running(url: str) -> float:
    return read_metric(url, "vllm:num_requests_running")


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it is true: a server cannot be told to call back."""
    never, deadline = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
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
