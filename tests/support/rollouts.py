"""Helpers of the rollout tests: groups of given versions, executors on fake engines, waits.

Waits are on conditions, with a deadline that only a hang reaches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import sdp_lightning as sdp
from sdp_lightning.engines.protocol import GenerationRequest, InferenceEngine
from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.factory import create_staleness_strategy, create_workflow_executor
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import FilteredSamplesCapacityModifier, StalenessManager
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.rollout.proximal_recompute import (
    LogprobScorer,
    ProximalRecomputer,
    RecomputeReport,
)
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Context, Row, SamplingParams, Segment, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow

DEADLINE_S = 60.0

Parts = list[Context | Segment]


def make_segment(version: int, num_tokens: int = 2, *, scored: int | None = None) -> Segment:
    segment = Segment(version, range(3, 3 + num_tokens), [-(version + 1) / 10] * num_tokens)
    if scored is not None:
        segment.proximal.set([-1.0] * num_tokens, scored)
    return segment


def make_trajectory(*versions: int) -> Trajectory:
    return Trajectory((Context([1, 2]), *(make_segment(version) for version in versions)))


def make_group(*members: Sequence[int], order: int = 0, row_id: str = "row") -> TrajectoryGroup:
    """One trajectory a member; a member lists the versions of its segments."""
    return TrajectoryGroup(
        tuple(make_trajectory(*versions) for versions in members), row_id=row_id, order=order
    )


class CodePoints:
    """A tokenizer: one token a character, its code point. 0 ends a text."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(t) for t in token_ids if t or not skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        said = "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        return said + ("<assistant>" if add_generation_prompt else "")


class Samples(RolloutWorkflow):
    """``group_size`` completions of a row, one after another; ``script`` may interfere.

    ``script(row)`` runs after sampling: it may raise, or say "reject".
    """

    def __init__(
        self,
        group_size: int = 1,
        *,
        max_new_tokens: int = 4,
        script: Callable[[Row], str | None] | None = None,
    ) -> None:
        self.group_size, self.script = group_size, script
        self._sampling = SamplingParams(max_new_tokens=max_new_tokens)

    @property
    def sampling(self) -> SamplingParams:
        return self._sampling

    async def run(self, row: Row, session: RolloutSession) -> list[Trajectory] | None:
        trajectories: list[Trajectory] = []
        for _ in range(self.group_size):
            episode = session.open()
            episode.add_context([1, 2])
            await episode.generate(self._sampling)
            trajectories.append(episode.finish(reward=1.0))
        if self.script is not None and self.script(row) == "reject":
            return None
        return trajectories


def make_executor(
    engine: InferenceEngine,
    workflow: RolloutWorkflow | None = None,
    *,
    rows: Sequence[Row] | int = 1000,
    **config: Any,
) -> WorkflowExecutor:
    settings = {"batch_size": 2, "timeout_s": DEADLINE_S, "shuffle": False} | config
    settings.setdefault("drain_s", 1.0)  # for requests that pass the gate and meet a paused engine
    return create_workflow_executor(
        config=sdp.RolloutConfig(**settings),
        engine=engine,
        workflow=workflow or Samples(),
        prompts=[{"id": f"row{i}"} for i in range(rows)] if isinstance(rows, int) else rows,
        tokenizer=CodePoints(),
    )


@contextmanager
def rolling(
    engine: InferenceEngine,
    workflow: RolloutWorkflow | None = None,
    *,
    version: int = 0,
    start: bool = True,
    **settings: Any,
) -> Iterator[WorkflowExecutor]:
    """An executor that generates, closed at the end; no thread of it is left."""
    executor = make_executor(engine, workflow, **settings)
    try:
        if start:
            executor.publish([], version, reset=True)
            executor.resume()
        yield executor
        assert_conserved(executor)
    finally:
        executor.close()
        engine.close()
    left = [t.name for t in threading.enumerate()]
    assert "sdp-rollout" not in left and "sdp-evaluation" not in left


def wait_until(
    executor: WorkflowExecutor, condition: Callable[[], bool], *, within_s: float = DEADLINE_S
) -> None:
    changed = executor.registry.changed
    with changed:
        assert changed.wait_for(condition, within_s), f"never came true; {executor.stat}"


def assert_conserved(executor: WorkflowExecutor) -> None:
    with executor.registry.changed:
        stat, groups = executor.stat, executor.registry.snapshot()
    ended = stat.pending + stat.consumed + stat.dropped + stat.rejected + stat.failed
    assert stat.submitted == stat.running + ended
    assert len([x for x in groups if not x.in_training]) == stat.running + stat.pending


def lags(batch: Sequence[TrajectoryGroup], version: int) -> list[int]:
    return [version - s.version for group in batch for s in group.segments]


def versions(trajectory: Trajectory) -> list[int]:
    return [segment.version for segment in trajectory.segments]


class RecordingEngine(FakeEngine):
    """Also writes down what it is told, and what is in flight when weights change."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.events: list[str] = []

    def pause(self) -> None:
        self.events.append("pause")
        super().pause()

    def update_weights(self, weights: Any, version: int, *, reset: bool = False) -> Any:
        self.events.append(f"update {version} with {self.num_in_flight} in flight")
        return super().update_weights(weights, version, reset=reset)

    def resume(self) -> None:
        self.events.append("resume")
        super().resume()

    async def generate(self, request: GenerationRequest, sink: Any) -> Any:
        self.events.append("generate")
        return await super().generate(request, sink)


class VersionScorer:
    """A ``LogprobScorer``: every token of version v scores ``-(v + 1)`` under ``self.version``.

    Keeps what it was asked.
    """

    is_collective = False

    def __init__(self) -> None:
        self.calls: list[list[Trajectory]] = []

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[np.ndarray[Any, Any]]]:
        self.calls.append(list(trajectories))
        return [
            [np.full(len(s), -(s.version + 1), dtype=np.float32) for s in t.segments]
            for t in trajectories
        ]


class Room:
    """A registry at a version, into which groups are put as they are wanted."""

    def __init__(self, version: int, *, max_head_lag: int = 4, mask: bool = False) -> None:
        config = sdp.RolloutConfig(
            batch_size=1, max_head_lag=max_head_lag, on_overdue="mask" if mask else "drop"
        )
        self.manager = StalenessManager(
            max_concurrent=99,
            batch_size=1,
            max_head_lag=max_head_lag,
            modifiers=(FilteredSamplesCapacityModifier(),),
        )
        strategy = create_staleness_strategy(config)
        self.registry = GroupRegistry(config, strategy, self.manager)
        self.registry.resume(version)
        self.version, self.scorer, self.num = version, VersionScorer(), 0
        self.recomputer = ProximalRecomputer(max_head_lag=max_head_lag, mask_overdue=mask)

    def add(self, *members: Parts, finished: bool = True) -> InFlightGroup:
        episodes: list[Episode] = []
        for parts in members:
            episodes.append(Episode(FakeEngine(), SendGate()))
            for part in [Context([1]), *parts]:
                episodes[-1]._append(part)
        session = RolloutSession(None, lambda n: episodes[n])  # type: ignore[arg-type]
        for _ in members:
            session.open()
        group = InFlightGroup(self.num, PromptRow(0, self.num, {}), 0, session)
        self.num += 1
        self.registry.add(group)
        if finished:
            self.registry.finish(group, group.make_group([e.finish(0.0) for e in episodes]))
        return group

    def run(self, scorer: LogprobScorer | None = None) -> RecomputeReport:
        return self.recomputer.run(self.registry, scorer or self.scorer, self.version)
