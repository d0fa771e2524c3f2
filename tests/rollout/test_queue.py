"""CONTRACT section 3: queue and cache lose nothing and keep the order of creation."""

from __future__ import annotations

import random
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import sdp_lightning.rollout
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.groups.queue import RolloutCache, RolloutQueue
from sdp_lightning.rollout.groups.staleness import SegmentWisePPOStrategy
from sdp_lightning.types import TrajectoryGroup
from support.rollouts import Room, make_group, make_segment


def orders(groups: list[TrajectoryGroup]) -> list[int]:
    return [group.order for group in groups]


OLD = {0, 4, 99}  # the last one is elsewhere


def filled(*, queue: bool) -> RolloutQueue | RolloutCache:
    groups = [make_group([v], order=o) for o, v in ((3, 1), (0, 0), (2, 1), (4, 0), (1, 1))]
    if not queue:
        cache = RolloutCache()
        cache.add(groups)
        return cache
    waiting = RolloutQueue(5)
    assert all(waiting.put(group) for group in groups)
    return waiting


@pytest.mark.parametrize("queue", [True, False], ids=["queue", "cache"])
def test_a_removal_returns_what_it_drops_and_keeps_the_order_of_the_rest(queue: bool) -> None:
    container = filled(queue=queue)
    assert orders(container.snapshot()) == [0, 1, 2, 3, 4]
    assert container.remove(set()) == []
    assert orders(container.remove(OLD)) == [0, 4]
    assert orders(container.snapshot()) == [1, 2, 3] and len(container) == 3
    assert container.remove(OLD) == [], "a second removal drops nothing"


@pytest.mark.fault("exception", "queue")
def test_a_purge_whose_verdict_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults: drain, process, put back; broad except and keep."""
    room = Room(0, max_head_lag=0)
    for _ in range(3):
        room.add([make_segment(0)])
    decide = SegmentWisePPOStrategy.is_stale

    def fail_late(self: SegmentWisePPOStrategy, group: TrajectoryGroup, version: int) -> bool:
        if group.order == 2:
            raise ValueError("malformed")
        return decide(self, group, version)

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="malformed"):
        patched.setattr(SegmentWisePPOStrategy, "is_stale", fail_late)
        room.registry.commit(1)
    assert room.manager.stat.dropped == 0
    room.registry.commit(2)
    assert room.manager.stat.dropped == 3, "what was not judged is judged by the next purge"


@pytest.mark.fault("slow", "queue")
def test_a_full_queue_refuses_without_loss_and_has_room_after_a_purge_or_drain() -> None:
    queue = RolloutQueue(2)
    late = make_group([1], order=9)
    assert queue.put(make_group([0], order=1)) and queue.put(make_group([1], order=0))
    assert not queue.put(late) and orders(queue.snapshot()) == [0, 1]
    queue.remove({1})
    assert queue.put(late) and not queue.put(late)
    assert orders(queue.drain()) == [0, 9] and len(queue) == 0 and queue.drain() == []
    with pytest.raises(ConfigError, match="maxsize=0"):
        RolloutQueue(0)


def test_taking_gives_whole_batches_of_the_oldest_or_nothing() -> None:
    cache = filled(queue=False)
    assert isinstance(cache, RolloutCache)
    assert cache.take(6) == [] and len(cache) == 5
    assert orders(cache.take(2)) == [0, 1] and orders(cache.take(3)) == [2, 3, 4]


@given(st.permutations(range(8)), st.integers(1, 8))
def test_any_order_of_arrival_is_taken_in_order_of_creation(arrival: list[int], n: int) -> None:
    cache = RolloutCache()
    for order in arrival:
        cache.add([make_group([0], order=order)])
    assert orders(cache.take(n)) == list(range(n))


def test_removals_while_producers_add_lose_nothing_and_reorder_nothing() -> None:
    queue, num_producers, each = RolloutQueue(10**6), 4, 200
    starting = threading.Barrier(num_producers + 1)

    def produce(first: int) -> None:
        rng = random.Random(first)
        starting.wait()
        for order in range(first, num_producers * each, num_producers):
            assert queue.put(make_group([0], order=order))
            if rng.random() < 0.5:
                old.add(order)

    old: set[int] = set()
    threads = [threading.Thread(target=produce, args=(n,)) for n in range(num_producers)]
    for thread in threads:
        thread.start()
    starting.wait()
    dropped: list[TrajectoryGroup] = []
    kept: list[TrajectoryGroup] = []
    while any(thread.is_alive() for thread in threads) or len(queue):
        dropped += queue.remove(old.copy())
        out = queue.drain()
        assert orders(out) == sorted(orders(out))
        kept += out
    assert sorted(orders(dropped + kept)) == list(range(num_producers * each))


@pytest.mark.parametrize("go_on", ["take", "commit"])
@pytest.mark.fault("slow", "queue")
def test_back_pressure_holds_groups_as_running_and_loses_and_reorders_none(go_on: str) -> None:
    """H=0, B=1: the queue has one place, and three groups finish in the order 1, 2, 0."""
    room = Room(0, max_head_lag=0)
    lives = [room.add([make_segment(0)], finished=False) for _ in range(3)]
    for index in (1, 2, 0):
        episodes = lives[index].session.episodes
        room.registry.finish(lives[index], lives[index].make_group([episodes[0].finish(0.0)]))
    stat = room.manager.stat
    assert (stat.running, stat.pending) == (2, 1)
    if go_on == "take":
        assert [[g.order for g in room.registry.take()] for _ in range(4)] == [[0], [1], [2], []]
        assert room.manager.stat.consumed == 3
    else:
        room.registry.commit(1)
        assert room.manager.stat.dropped == 3 and room.registry.take() == []


@pytest.mark.parametrize("folder", ["rollout", "workflows", "rewards"])
def test_nothing_in_the_rollout_stack_sleeps(folder: str) -> None:
    """Fault: polling sleeps of half a second."""
    package = Path(sdp_lightning.rollout.__file__).parent.parent
    files = [
        f for f in (package / folder).rglob("*.py") if "simulation" not in f.parts
    ]  # own clock
    sleeps = re.compile(r"sleep\((?!0\))")  # of 0 s it lets the loop go on
    assert len(files) > 1 and not [f.name for f in files if sleeps.search(f.read_text())]
