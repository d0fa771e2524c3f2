"""Conversations with an environment that counts, and what a rollout of one is as text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from support.rollouts import CodePoints, rolling

ROWS = [{"id": f"r{i}", "prompt": f"{i}+{i}="} for i in range(10)]


class Counts(sdp.Environment):
    """Says which turn it was, for 3 turns; the reward is the number of the turn."""

    num_turns = 3

    def reset(self, row: Mapping[str, Any]) -> Any:
        self.turn = 0
        return row["prompt"]

    def step(self, completion: str) -> Any:
        self.turn += 1
        return f"turn {self.turn}", self.turn, self.turn == self.num_turns


class CountsLater(sdp.Environment):
    """The same, async."""

    def __init__(self) -> None:
        self.inner = Counts()

    async def reset(self, row: Mapping[str, Any]) -> Any:
        await asyncio.sleep(0)
        return self.inner.reset(row)

    async def step(self, completion: str) -> Any:
        await asyncio.sleep(0)
        return self.inner.step(completion)


def make(environment: Any = Counts, **settings: Any) -> sdp.MultiTurnWorkflow:
    given = {"group_size": 2, "sampling": SamplingParams(max_new_tokens=4)}
    return sdp.MultiTurnWorkflow(
        environment, **(given | {"turn_format": "[{observation}]"} | settings)
    )


def roll(workflow: sdp.RolloutWorkflow, engine: FakeEngine | None = None) -> list[sdp.Trajectory]:
    """The trajectories of one group."""
    settings: dict[str, Any] = {"rows": ROWS[:1], "num_epochs": 1, "batch_size": 1}
    with rolling(engine or FakeEngine(3), workflow, **settings) as executor:
        batch = executor.take() or []
    return [trajectory for group in batch for trajectory in group.trajectories]


def texts(trajectory: sdp.Trajectory) -> list[tuple[str, str]]:
    """Who wrote what."""
    return [
        (type(part).__name__, CodePoints().decode(part.token_ids.tolist()))
        for part in trajectory.parts
    ]
