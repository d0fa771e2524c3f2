"""Helpers of the tests of agents: an engine whose every token is another one, and trees on it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import FinishReason, Segment
from sdp_lightning.workflows.agent.tree import TurnTree
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.send_gate import SendGate

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
