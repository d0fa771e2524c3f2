"""CONTRACT section 1: the ledger is conserved, and capacity follows from it."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, strategies as st

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.rollout.groups.ledger import (
    CapacityModifier,
    FilteredSamplesCapacityModifier,
    RolloutStat,
    StalenessManager,
)


def make_manager(
    C: int = 100, B: int = 4, H: int = 2, modifiers: tuple[CapacityModifier, ...] | None = None
) -> StalenessManager:
    if modifiers is None:
        modifiers = (FilteredSamplesCapacityModifier(),)
    return StalenessManager(max_concurrent=C, batch_size=B, max_head_lag=H, modifiers=modifiers)


def count(manager: StalenessManager, **counts: int) -> StalenessManager:
    """Brings a fresh manager to these counts."""
    manager.on_submitted(sum(counts.values()))
    manager.on_accepted(sum(counts.get(name, 0) for name in ("pending", "consumed", "dropped")))
    manager.on_consumed(counts.get("consumed", 0))
    manager.on_dropped(counts.get("dropped", 0))
    manager.on_rejected(counts.get("rejected", 0))
    manager.on_failed(counts.get("failed", 0))
    return manager


def is_conserved(stat: RolloutStat) -> bool:
    ended = stat.consumed + stat.dropped + stat.rejected + stat.failed
    return stat.submitted == stat.running + stat.pending + ended


@dataclass
class Case:
    name: str
    expected: int
    C: int = 100
    B: int = 4
    H: int = 2
    version: int = 0
    counts: dict[str, int] = field(default_factory=dict)


CASES = [
    Case("fresh, the concurrency bound is the lower one", 10, C=10),
    Case("fresh, large batches, still the concurrency bound", 100, B=32, H=10),
    Case("fresh, the staleness bound is the lower one", 12),
    Case("five versions later the staleness bound has grown by five batches", 32, version=5),
    Case("three running leave seven of ten", 7, C=10, counts={"running": 3}),
    Case("five pending leave seven of twelve", 7, counts={"pending": 5}),
    Case("five consumed leave seven of twelve", 7, counts={"consumed": 5}),
    Case("H=0 at version 0 allows one batch", 8, B=8, H=0),
    Case("H=0 at version 5 has allowed six batches", 48, B=8, H=0, version=5),
    Case("a million versions do not overflow the bound", 10000, 10000, 64, 10, version=10**6),
    Case(
        "rejected groups never entered accepted and need no credit",
        *(17, 20, 8, 3),
        counts={"pending": 15, "rejected": 5},
    ),
    Case("failed groups need no credit either", 17, 20, 8, 3, counts={"pending": 15, "failed": 5}),
    Case("without version progress thirty accepted leave two", 2, 100, 8, 3, 0, {"pending": 30}),
    Case("twelve dropped groups give their capacity back", 12, counts={"dropped": 12}),
    Case(
        "a credit never lifts the concurrency bound", 0, C=10, counts={"running": 10, "dropped": 90}
    ),
    Case("never negative", 0, C=5, counts={"running": 9}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_capacity(case: Case) -> None:
    manager = count(make_manager(case.C, case.B, case.H), **case.counts)
    assert manager.capacity(case.version) == case.expected
    assert is_conserved(manager.stat)


def test_without_the_modifier_drops_shrink_the_pipeline_for_good() -> None:
    assert count(make_manager(modifiers=()), dropped=12).capacity(0) == 0


def test_after_a_resume_at_version_v_capacity_is_what_a_fresh_run_would_have() -> None:
    V, P, R = 7, 3, 2
    manager = make_manager()
    manager.on_version_recovered(V)
    assert manager.capacity(V) == (2 + 1) * 4
    manager.on_submitted(P)
    manager.on_accepted(P)
    manager.on_submitted(R)
    assert manager.capacity(V) == (2 + 1) * 4 - P - R
    assert manager.stat.consumed == V * 4 and is_conserved(manager.stat)


def test_a_recovery_keeps_what_runs_and_waits_and_forgets_old_totals() -> None:
    manager = count(make_manager(), running=2, pending=3, dropped=5, rejected=7, failed=1)
    manager.on_version_recovered(2)
    assert manager.stat == RolloutStat(13, running=2, pending=3, consumed=8)
    with pytest.raises(RolloutError, match="cannot recover version -1"):
        manager.on_version_recovered(-1)


@pytest.mark.parametrize(
    "transition",
    ["on_accepted", "on_rejected", "on_failed", "on_overdue", "on_dropped", "on_consumed"],
)
def test_a_verdict_without_a_group_is_an_error_and_changes_nothing(transition: str) -> None:
    manager = make_manager()
    with pytest.raises(RolloutError, match="never submitted"):
        getattr(manager, transition)()
    assert manager.stat == RolloutStat()
    with pytest.raises(RolloutError, match="cannot count -1"):
        manager.on_submitted(-1)


@pytest.mark.parametrize(("C", "B", "H"), [(0, 4, 2), (10, 0, 2), (10, 4, -1)])
def test_settings_with_which_nothing_could_ever_start_are_refused(C: int, B: int, H: int) -> None:
    with pytest.raises(ConfigError, match=f"got {C}, {B} and {H}"):
        make_manager(C, B, H)


def test_modifiers_act_in_order_on_the_staleness_term_and_see_a_snapshot() -> None:
    seen: list[tuple[int, RolloutStat]] = []

    class Halve:
        def modify(self, staleness_bound: int, stat: RolloutStat) -> int:
            seen.append((staleness_bound, stat))
            return staleness_bound // 2

    manager = count(make_manager(modifiers=(FilteredSamplesCapacityModifier(), Halve())), dropped=4)
    assert manager.capacity(0) == 6  # (12 - 4 + 4) // 2; the other order gives 8 // 2 + 4 = 8
    assert seen == [(12, manager.stat)]


def test_a_modifier_may_call_the_manager() -> None:
    class Nosy:
        manager: StalenessManager

        def modify(self, staleness_bound: int, stat: RolloutStat) -> int:
            self.manager.on_submitted()
            return staleness_bound - self.manager.stat.running

    nosy = Nosy()
    nosy.manager = make_manager(modifiers=(nosy,))
    assert nosy.manager.capacity(0) == 11


def test_concurrent_counters_end_exact() -> None:
    manager = make_manager(C=10**6)
    starting = threading.Barrier(8)

    def work() -> None:
        starting.wait()
        for _ in range(300):
            manager.on_submitted(6)
            manager.on_accepted(3)
            manager.on_rejected()
            manager.on_failed()
            manager.on_overdue()
            manager.on_consumed()
            manager.on_dropped()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    n = 8 * 300
    assert manager.stat == RolloutStat(6 * n, 0, n, n, 2 * n, n, n)


@given(
    st.lists(st.sampled_from(["submit", "accept", "reject", "fail", "overdue", "drop", "consume"])),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_any_sequence_of_transitions_conserves_the_ledger(
    steps: list[str], C: int, B: int, H: int
) -> None:
    manager = make_manager(C, B, H)
    actions = {
        "submit": manager.on_submitted,
        "accept": manager.on_accepted,
        "reject": manager.on_rejected,
        "fail": manager.on_failed,
        "overdue": manager.on_overdue,
        "drop": manager.on_dropped,
        "consume": manager.on_consumed,
    }
    accepted = 0
    for step in steps:
        before = manager.stat
        try:
            actions[step]()
        except RolloutError:
            assert manager.stat == before
        assert is_conserved(manager.stat) and min(vars(manager.stat).values()) >= 0
        assert manager.stat.accepted >= accepted
        accepted = manager.stat.accepted
        assert 0 <= manager.capacity(0) <= max(0, C - manager.stat.running)


@pytest.mark.parametrize("seed", range(3))
def test_dropping_a_fifth_of_the_groups_for_400_versions_never_stalls(seed: int) -> None:
    """Faults: one drop compensated twice, another never; compensation that decays."""
    rng, manager = random.Random(seed), make_manager(C=16, B=4, H=2)
    for version in range(400):
        while manager.stat.pending < 4:
            room = manager.capacity(version)
            assert room > 0 or manager.stat.running, f"stalled at version {version}"
            manager.on_submitted(room)
            manager.on_accepted(manager.stat.running)
            manager.on_dropped(sum(rng.random() < 0.2 for _ in range(manager.stat.pending)))
        manager.on_consumed(4)
    assert manager.capacity(400) == 3 * 4 - manager.stat.pending
