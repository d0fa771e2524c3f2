"""10,000 groups with random ends: nothing grows, and the ledger is conserved at every instant."""

from __future__ import annotations

import gc
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow
from support.rollouts import VersionScorer, make_executor

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")

BATCH_SIZE, NUM_GROUPS, WARM_GROUPS = 8, 10_000, 2_000
MAX_GROWTH_KIB = 6 * 1024


class Chance(RolloutWorkflow):
    """Fails, is rejected, or is slow by chance."""

    sampling = SamplingParams(max_new_tokens=8)

    def __init__(self) -> None:
        self._dice = random.Random(0)

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        chance, episodes = self._dice.random(), [session.open() for _ in range(2)]
        for turn in range(1 + 3 * (chance > 0.9)):
            for episode in episodes:
                episode.add_context([1, 2, 3 + turn])
                await episode.generate(self.sampling)
        if chance < 0.05:
            raise ValueError(f"failed by chance, in row {row['id']}")
        return None if chance < 0.15 else [e.finish(chance) for e in episodes]


@dataclass(frozen=True)
class Footprint:
    """Of this process: resident and Python memory in KiB, threads, open files, live groups."""

    resident: int
    traced: int
    threads: int
    files: int
    live: int

    @classmethod
    def take(cls, executor: WorkflowExecutor) -> Footprint:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident=pages * os.sysconf("SC_PAGE_SIZE") // 1024,
            traced=tracemalloc.get_traced_memory()[0] // 1024,
            threads=threading.active_count(),
            files=len(os.listdir("/proc/self/fd")),
            live=len(executor.registry.snapshot()),
        )


class Auditor(threading.Thread):
    """Looks at the ledger all the time, from a thread of its own."""

    def __init__(self, executor: WorkflowExecutor) -> None:
        super().__init__(name="auditor")
        self._executor, self._ended = executor, threading.Event()
        self.broken: list[RolloutStat] = []
        self.num_looks = 0

    def run(self) -> None:
        while not self._ended.wait(0.001):
            stat = self._executor.stat
            ended = stat.pending + stat.consumed + stat.dropped + stat.rejected + stat.failed
            if stat.submitted != stat.running + ended or min(vars(stat).values()) < 0:
                self.broken.append(stat)
            self.num_looks += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()


def soak(executor: WorkflowExecutor, num_groups: int) -> None:
    """Train until so many groups have come to an end."""
    scorer = VersionScorer()
    while executor.stat.submitted - executor.stat.running - executor.stat.pending < num_groups:
        batch = executor.take()
        assert batch is not None
        for group in batch:
            assert group.head_version is not None
            assert executor.version - group.head_version <= executor.config.max_head_lag
        executor.recompute(scorer)
        scorer.calls.clear()
        executor.publish([], executor.version + 1)


def reply(request: GenerationRequest) -> int:
    return 1 + request.seed % 8


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("updates_in_flight", [True, False], ids=["in process", "interrupted"])
def test_nothing_grows_over_ten_thousand_groups(
    updates_in_flight: bool, tell: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR", logger="sdp_lightning")  # pytest keeps every warning
    engine = FakeEngine(reply, updates_in_flight=updates_in_flight, latency_s=0.002, chunks=2)
    settings: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "max_head_lag": 2,
        "max_concurrent": 32,
        "drain_s": 0.1,  # for requests that pass the gate and meet a paused engine
        "max_failures": 10**6,
        "max_rejected_in_a_row": 10**6,
    }
    executor = make_executor(engine, Chance(), **settings)
    auditor = Auditor(executor)
    before = Footprint(0, 0, threading.active_count(), len(os.listdir("/proc/self/fd")), 0)
    try:
        executor.publish([], 0, reset=True)
        auditor.start()
        executor.resume()
        soak(executor, WARM_GROUPS)
        tracemalloc.start()
        soak(executor, WARM_GROUPS + 500)  # what is replaced now was traced, too
        begun = Footprint.take(executor)
        soak(executor, NUM_GROUPS)
        ended, stat = Footprint.take(executor), executor.stat
    finally:
        tracemalloc.stop()
        auditor.stop()
        executor.close()
        engine.close()
    tell(f"{stat}\nbegun {begun}\nended {ended}; {auditor.num_looks} looks at the ledger")
    assert not auditor.broken and auditor.num_looks > 100
    assert stat.submitted >= NUM_GROUPS and executor.version > NUM_GROUPS // BATCH_SIZE // 2
    assert min(stat.failed, stat.rejected, stat.dropped) > 50, "all kinds of ends"
    assert ended.resident - begun.resident < MAX_GROWTH_KIB
    assert ended.traced - begun.traced < MAX_GROWTH_KIB // 8
    assert (ended.threads, ended.files) == (begun.threads, begun.files)
    assert ended.live <= (2 + 2) * BATCH_SIZE + 32
    assert threading.active_count() == before.threads
    assert len(os.listdir("/proc/self/fd")) <= before.files


def test_a_soak_of_this_kind_would_see_a_leak() -> None:
    """The same measure, over a list that grows by what a group leaves behind."""
    tracemalloc.start()
    try:
        engine = FakeEngine()
        executor = make_executor(engine, Chance())
        before, leak = Footprint.take(executor), list[bytes]()
        for _ in range(NUM_GROUPS - WARM_GROUPS):
            leak.append(bytes(256))
        assert Footprint.take(executor).traced - before.traced > MAX_GROWTH_KIB // 8
        executor.close()
        engine.close()
    finally:
        tracemalloc.stop()
