"""Costs with many groups alive, in operations: what a step looks at, not how long it takes."""

from __future__ import annotations

import runpy
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import sdp_lightning as sdp
from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.rollout.checkpoint.group_state import num_groups, read_groups
from sdp_lightning.rollout.groups.group_index import LookTimes, Untrained
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import StalenessManager
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.rollout.groups.staleness import (
    SegmentWisePPOStrategy,
    StalenessControlStrategy,
)
from sdp_lightning.rollout.proximal_recompute import ProximalRecomputer
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import TrajectoryGroup
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import versions_of
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.workflow import RolloutSession
from support.rollouts import DEADLINE_S, VersionScorer, make_segment, rolling, wait_until

BENCHMARK = Path(__file__).parents[2] / "recipes/benchmarks/speed/many_groups.py"


class CountingStrategy(StalenessControlStrategy):
    """The verdicts of another strategy, and how often each was asked for."""

    def __init__(self, strategy: StalenessControlStrategy) -> None:
        self.strategy, self.asked = strategy, Counter[str]()

    def is_stale(self, group: TrajectoryGroup, version: int) -> bool:
        self.asked["is_stale"] += 1
        return self.strategy.is_stale(group, version)

    def overdue_from(self, head_version: int, tail_version: int) -> int | None:
        self.asked["overdue_from"] += 1
        return self.strategy.overdue_from(head_version, tail_version)

    def stale_from(self, group: TrajectoryGroup, version: int) -> int | None:
        self.asked["stale_from"] += 1
        return self.strategy.stale_from(group, version)


class Crowd:
    """``size`` running and ``size`` finished groups of each version from 0 to the present."""

    def __init__(self, size: int, *, version: int, max_head_lag: int, on_overdue: str) -> None:
        config = sdp.RolloutConfig(
            batch_size=size,
            max_head_lag=max_head_lag,
            on_overdue=on_overdue,  # type: ignore[arg-type]
        )
        self.strategy = CountingStrategy(SegmentWisePPOStrategy(max_head_lag=max_head_lag))
        manager = StalenessManager(max_concurrent=9999, batch_size=size, max_head_lag=max_head_lag)
        self.registry, self.num = GroupRegistry(config, self.strategy, manager), 0
        self.running: list[InFlightGroup] = []
        self.registry.resume(0)
        for created in range(version + 1):
            for number in range(2 * size):
                self.add(created, finished=number % 2 == 0)
            if created < version:
                self.registry.commit(created + 1)
        self.strategy.asked.clear()

    def add(self, version: int, *, finished: bool) -> None:
        episode = Episode(FakeEngine(), SendGate())
        session = RolloutSession(None, lambda n: episode)  # type: ignore[arg-type]
        session.open().add_context([1])
        episode._append(make_segment(version))
        group = InFlightGroup(self.num, PromptRow(0, self.num, {}), version, session)
        self.num += 1
        self.registry.add(group)
        if finished:
            self.registry.finish(group, group.make_group([episode.finish(0.0)]))
        else:
            self.running.append(group)


@pytest.mark.parametrize("max_head_lag", [2, 6])
def test_a_commit_looks_only_at_groups_that_go_stale(max_head_lag: int) -> None:
    """4 finished and 4 running groups of a version go stale: the others are not looked at."""
    crowd = Crowd(4, version=max_head_lag, max_head_lag=max_head_lag, on_overdue="drop")
    assert len(crowd.registry.commit(max_head_lag + 1)) == 4
    assert crowd.registry.manager.stat.dropped == 8
    assert len(crowd.registry.snapshot()) == 8 * max_head_lag
    # A running group costs two questions: by its creation, then by its tokens.
    assert crowd.strategy.asked == {"is_stale": 4, "overdue_from": 4 * 2}


def test_a_wait_for_stragglers_looks_at_versions_and_not_at_groups() -> None:
    asked: list[int] = []
    for size in (2, 20):
        crowd = Crowd(size, version=3, max_head_lag=3, on_overdue="wait")
        assert crowd.registry.take() == [], "8 older groups than later batches can take"
        asked.append(crowd.strategy.asked["overdue_from"])
    assert asked[0] == asked[1] <= 4


def test_a_recomputation_opens_only_groups_that_the_last_version_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd, opened = Crowd(3, version=5, max_head_lag=9, on_overdue="drop"), list[int]()
    parts = InFlightGroup.parts.fget
    assert parts is not None

    def count(group: InFlightGroup) -> object:
        opened.append(group.created_version)
        return parts(group)

    monkeypatch.setattr(InFlightGroup, "parts", property(count))
    report = ProximalRecomputer(max_head_lag=9).run(crowd.registry, VersionScorer(), 5)
    assert report.num_segments == 6 and opened == [4] * 6


def test_a_checkpoint_is_written_while_rollouts_go_on() -> None:
    """One of two groups ends after the checkpoint was noted, and all are written without a lock."""
    engine = FakeEngine(reply=3, manual=True)
    with rolling(engine, batch_size=1, max_head_lag=1, max_concurrent=2) as executor:
        engine.advance(1, awaiting=2)
        executor.publish([], 1)  # closes their first segments
        executor.pause()
        with executor.registry.changed:
            position = executor._source.position(executor.registry.snapshot())
        engine.advance(9, only=0, awaiting=2)
        wait_until(executor, lambda: executor.stat.pending == 1)
        states: list[dict[str, Any]] = []
        with executor.registry.changed:
            writer = threading.Thread(target=lambda: states.append(position.state_dict()))
            writer.start()
            writer.join(DEADLINE_S)
        (state,) = states
        assert num_groups(state["pending"]) == 0
        saved = read_groups(state["running"], finished=False)
        assert [group.order for group in saved] == [0, 1]
        assert [versions_of(group.logs[0]) for group in saved] == [(0, 1), (0, 0)]


def test_an_episode_begun_anew_takes_its_versions_out_of_its_session() -> None:
    session = RolloutSession(
        None,  # type: ignore[arg-type]
        lambda n: Episode(FakeEngine(), SendGate()),
        [(make_segment(2),), (make_segment(7), make_segment(9))],
    )
    assert session.versions == (2, 9), "what is to be restored counts, opened or not"
    session.open()
    session.open()
    assert session.versions == (2, 9)
    session.reopen(1)
    assert session.versions == (2, 9)
    session.reopen(1, keep=False)
    assert session.versions == (2, 2)


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5)), max_size=30))
def test_a_group_is_due_from_the_version_that_was_said_last(
    said: list[tuple[int, int | None]],
) -> None:
    looks, last = LookTimes(), dict(said)
    for order, version in said:
        looks.set(order, version)
    for now in range(6):
        due = [order for order, version in last.items() if version is not None and version <= now]
        assert looks.due(now) == sorted(due)
    assert not [version for version, orders in looks._orders_at.items() if not orders], "leaks"


@given(
    created=st.lists(st.integers(0, 4), min_size=1, max_size=12).map(sorted),
    taken=st.integers(0, 4),
    size=st.integers(1, 3),
    lag=st.integers(0, 4),
)
def test_later_batches_cannot_take_all_that_goes_stale(
    created: list[int], taken: int, size: int, lag: int
) -> None:
    """Against the definition: at most j * size of those left may be stale j versions later."""
    version, untrained = max(created), Untrained()
    for order, born in enumerate(created):
        untrained.add(order, born, runs=order % 2 == 0)
    left = created[taken:]
    expected = any(
        sum(version + 1 + j - born > lag for born in left) > j * size for j in range(lag + 1)
    )
    batch = range(min(taken, len(created)))
    assert untrained.exceed(size, batch, version + 1, lambda v: v + lag + 1) == expected
    assert untrained.oldest_running == 0
    untrained.discard(0)
    assert untrained.oldest_running == (2 if len(created) > 2 else None)


def test_the_benchmark_runs_at_a_tiny_size() -> None:
    script = runpy.run_path(str(BENCHMARK))
    load = script["Load"](groups=24, tokens=2, batch=4)
    medians = script["measure"](load, steps=2, copies=True)
    assert set(medians) == {"take", "publish", "snapshot", "checkpoint", "its copy"}
    filled = script["FilledExecutor"](load)
    filled.step(script["Stopwatch"](), copies=False)
    stat = filled.executor.stat
    filled.executor.close()
    assert stat.consumed == 4 and stat.dropped == 4, "one finished and three running ones go stale"
    assert stat.running + stat.pending == 24
