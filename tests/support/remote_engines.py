"""Requests to remote engines on fake servers, and what their answers must be."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest, InferenceEngine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.types import SamplingParams, Segment, TrajectoryGroup
from support.fake_servers import Server, assert_nothing_left, weights
from support.rollouts import Samples, rolling


def request(tokens: int = 3, budget: int = 4, key: str = "") -> GenerationRequest:
    return GenerationRequest(
        token_ids=np.arange(tokens),
        params=SamplingParams(max_new_tokens=budget),
        group_key=key,
    )


def publish(engine: RemoteInfEngine, version: int, *, reset: bool = False) -> None:
    engine.pause()
    engine.update_weights(weights(float(version)), version, reset=reset)
    engine.resume()


def publish_thrice(
    engine: RemoteInfEngine, server: Server, *, budget: int, step: int
) -> list[TrajectoryGroup]:
    """Eight requests for ``budget`` tokens, and three publishes, each after ``step`` tokens more.

    Every token is the one of its place and version; nothing of the engine is left.
    """
    server.do(held=True)
    engine.start()
    workflow = Samples(max_new_tokens=budget)
    with rolling(engine, workflow, batch_size=8, max_head_lag=4, max_concurrent=8) as executor:
        for version in (1, 2, 3):
            server.do(wait={"running": 8})
            server.do(step=step, wait={"stalled": True})
            executor.publish(weights(float(version)), version)
        server.do(held=False)
        batch = executor.take()
        assert batch is not None
        groups = list(batch)
        assert_exact(groups, budget)
        executor.pause()
    assert_nothing_left()
    return groups


class Sending:
    """Requests that run in a loop of another thread."""

    def __init__(self, engine: InferenceEngine, requests: list[GenerationRequest]) -> None:
        self.segments: list[list[Segment]] = [[] for _ in requests]
        self.results: list[Any] = []
        self._engine, self._requests = engine, requests
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def _run(self) -> None:
        work = [
            self._engine.generate(one, segments.append)
            for one, segments in zip(self._requests, self.segments, strict=True)
        ]
        self.results = await asyncio.gather(*work, return_exceptions=True)

    def join(self) -> list[Any]:
        self._thread.join(60.0)
        assert not self._thread.is_alive(), "a request never came back"
        return self.results


def generate(engine: InferenceEngine, one: GenerationRequest) -> list[Segment]:
    sending = Sending(engine, [one])
    for result in sending.join():
        if isinstance(result, BaseException):
            raise result
    return sending.segments[0]


def assert_exact(groups: list[TrajectoryGroup], budget: int) -> None:
    """Every token is the one of its place, stamped with the version that its log-prob shows."""
    for group in groups:
        for trajectory in group.trajectories:
            tokens = [t for s in trajectory.segments for t in s.token_ids.tolist()]
            assert tokens == [position % 7 + 3 for position in range(2, 2 + budget)]
            for segment in trajectory.segments:
                expected = [-(segment.version + 1) / 10] * len(segment)
                assert segment.logprobs.tolist() == pytest.approx(expected)
