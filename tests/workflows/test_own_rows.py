"""What a reward, an environment or a workflow changes in its row is its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.workflow import RolloutSession
from support.rollouts import Samples, rolling

SAMPLING = SamplingParams(max_new_tokens=4)


def make_rows() -> list[dict[str, Any]]:
    opening = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    return [
        {"id": f"r{i}", "prompt": "?", "asked": opening, "tests": ["a"], "n": 0} for i in range(2)
    ]


def spoil(row: dict[str, Any], seen: list[Any]) -> None:
    """Keep what the row is, then change it at its top and in its depth."""
    seen.append(copy.deepcopy(row))
    row["tests"].pop()
    row["asked"][0]["content"].clear()
    row["n"] += 1
    del row["id"]


def one(seen: list[Any]) -> sdp.RolloutWorkflow:
    def reward(completion: str, row: dict[str, Any]) -> float:
        spoil(row, seen)
        return 0.0

    return sdp.RLVRWorkflow(reward, group_size=3, sampling=SAMPLING)


def of_the_messages(seen: list[Any]) -> sdp.RolloutWorkflow:
    def reward(completion: str, row: dict[str, Any], messages: list[Any]) -> float:
        messages[0].clear()
        spoil(row, seen)
        return 0.0

    return sdp.RLVRWorkflow(reward, group_size=3, sampling=SAMPLING, prompt_key="asked")


def of_a_group(seen: list[Any]) -> sdp.RolloutWorkflow:
    def reward(completions: list[str], row: dict[str, Any]) -> list[float]:
        spoil(row, seen)
        return [0.0] * len(completions)

    return sdp.RLVRWorkflow(reward, group_size=3, sampling=SAMPLING)


def in_environments(seen: list[Any]) -> sdp.RolloutWorkflow:
    class Spoiler(sdp.Environment):
        def reset(self, row: Any) -> str:
            spoil(row, seen)
            return "?"

        def step(self, completion: str) -> tuple[str, float, bool]:
            return "", 0.0, True

    return sdp.MultiTurnWorkflow(
        Spoiler, group_size=3, sampling=SAMPLING, turn_format="{observation}"
    )


def of_its_own(seen: list[Any]) -> sdp.RolloutWorkflow:
    class Own(Samples):
        async def run(self, row: Any, session: RolloutSession) -> Sequence[sdp.Trajectory] | None:
            spoil(row, seen)
            return await super().run({}, session)

    return Own()


@pytest.mark.parametrize("make", [one, of_the_messages, of_a_group, in_environments, of_its_own])
def test_every_sample_reads_the_row_as_it_is_in_the_dataset(make: Any) -> None:
    rows, seen = make_rows(), list[Any]()
    workflow = make(seen)
    with rolling(FakeEngine(), workflow, rows=rows, num_epochs=2) as executor:
        groups = [*(executor.take() or ()), *(executor.take() or ())]
        judged = executor.evaluate(rows, workflow)
    assert [g.row_id for g in (*groups, *judged)] == ["r0", "r1"] * 3
    assert len(seen) >= 6 and all(row in make_rows() for row in seen)
    assert rows == make_rows()


def test_what_cannot_be_copied_is_shared_and_said(caplog: pytest.LogCaptureFixture) -> None:
    lock, seen = threading.Lock(), list[Any]()

    def reward(completion: str, row: dict[str, Any]) -> float:
        row["tests"].append("b")
        seen.append(row)
        return 0.0

    row = MappingProxyType({"id": "r", "prompt": "?", "lock": lock, "tests": ["a"]})
    workflow = sdp.RLVRWorkflow(reward, group_size=2, sampling=SAMPLING)
    with rolling(FakeEngine(), workflow, rows=[row], batch_size=1) as executor:
        executor.take()
    assert seen[0]["lock"] is lock and seen[0]["tests"] == seen[1]["tests"] == ["a", "b"]
    assert row["tests"] == ["a"]
    said = [r.message for r in caplog.records if "under 'lock'" in r.message]
    assert len(said) == 1 and "all samples share it" in said[0]
