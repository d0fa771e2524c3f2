"""Groups that are saved half-way and go on in another executor."""

from __future__ import annotations

from typing import Any

from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.testing import FakeEngine
from sdp_lightning.workflows.workflow import RolloutWorkflow
from support.checkpoints import content, finished, through_a_file
from support.rollouts import (
    VersionScorer,
    rolling,
    wait_until,
)

SETTINGS = {"batch_size": 1, "max_head_lag": 3, "rows": 4, "num_epochs": 1}  # all at once


def halfway(workflow: RolloutWorkflow) -> tuple[dict[str, Any], list[Any]]:
    """4 groups at version 2, their first sample with 3 + 2 of 8 tokens: a state, and their ends."""
    engine = FakeEngine(reply=8, manual=True)
    with rolling(engine, workflow, **SETTINGS) as executor:
        engine.advance(3, awaiting=4)
        executor.publish([], 1)
        executor.recompute(VersionScorer())
        engine.advance(2, awaiting=4)
        executor.publish([], 2)
        state = through_a_file(executor.state_dict())
        return state, run_to_the_end(executor, engine)


def run_to_the_end(executor: WorkflowExecutor, engine: FakeEngine) -> list[Any]:
    """Finish the 4 groups that are under way."""
    engine.advance(9, awaiting=4)
    wait_until(executor, lambda: executor.stat.pending == 4)
    return [content(group) for group in finished(executor)]


def resume(executor: WorkflowExecutor, state: dict[str, Any], version: int = 2) -> None:
    executor.load_state_dict(state)
    executor.publish([], version, reset=True)
    executor.resume()
