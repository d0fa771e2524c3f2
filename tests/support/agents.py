"""Helpers of the tests of agents: engines with a script, trees on them, and what agents send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np

import sdp_lightning as sdp
from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import FinishReason, SamplingParams, Segment
from sdp_lightning.workflows.agent.tree import TurnTree
from sdp_lightning.workflows.agent.workflow import AgentWorkflow
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.send_gate import SendGate
from support.conversations import ROWS
from support.rollouts import CodePoints, rolling

FIRST_SAMPLED = 1000


class CountingEngine(FakeEngine):
    """Samples 1000, 1001, ...: no token twice, so a token that is trained twice is seen."""

    def __init__(self, length: int = 2) -> None:
        super().__init__()
        self.length, self.next = length, FIRST_SAMPLED
        self.read: list[list[int]] = []

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        self.read.append(request.token_ids.tolist())
        for _ in range(min(self.length, request.params.max_new_tokens)):
            await asyncio.sleep(0)  # where turns of the same sample mingle
            sink(Segment(0, [self.next], [-0.5]))
            self.next += 1
        return "stop"


def make_tree(engine: Any, *, saved: Any = ()) -> TurnTree:
    """A tree whose branches repeat the ``saved`` logs that are like them."""
    gate, logs = SendGate(), [list(log) for log in saved]

    def open_episode(number: int, is_like: Any) -> Episode:
        episode = Episode(engine, gate, seed=number)
        place = next((n for n, log in enumerate(logs) if is_like(log)), None)
        if place is not None:
            episode.restore(logs.pop(place))
        return episode

    return TurnTree(open_episode)


def ids(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.int64)


class SayingEngine(FakeEngine):
    """Says what ``say`` makes of the text that it reads, in code points, ended by 0."""

    def __init__(self, say: Callable[[str], str], *, is_cut: bool = False) -> None:
        super().__init__()
        self.say, self.is_cut = say, is_cut
        self.read: list[str] = []

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        await asyncio.sleep(0)
        self.read.append(CodePoints().decode(request.token_ids.tolist()))
        tokens = [*map(ord, self.say(self.read[-1])), 0]
        tokens = tokens[: request.params.max_new_tokens]
        sink(Segment(self.version or 0, tokens, [-0.1] * len(tokens)))
        return "stop" if tokens[-1] == 0 else "length"


def roll_agent(
    agent: Any, engine: FakeEngine | None = None, **settings: Any
) -> list[sdp.TrajectoryGroup]:
    """The group of one row, which is ``row=`` or a sum."""
    row = settings.pop("row", ROWS[0])
    given = {"group_size": 2, "sampling": SamplingParams(max_new_tokens=200)} | settings
    rows: dict[str, Any] = {"rows": [row], "num_epochs": 1, "batch_size": 1}
    with rolling(engine or FakeEngine(3), AgentWorkflow(agent, **given), **rows) as executor:
        return executor.take() or []


async def post(
    endpoint: Any,
    body: Any,
    path: str = "/v1/chat/completions",
    *,
    key: str | None = None,
    **headers: str,
) -> tuple[int, Any]:
    """Status and body of the answer to a request that no client library makes."""
    root = endpoint.base_url.removesuffix("/v1")
    authorization = f"Bearer {endpoint.api_key if key is None else key}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": authorization, **{k.replace("_", "-"): v for k, v in headers.items()}}
    async with (
        aiohttp.ClientSession() as client,
        client.post(root + path, data=data, headers=sent) as answer,
    ):
        return answer.status, await answer.json()


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A body whose messages are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return {"model": "policy", "messages": said, **more}
