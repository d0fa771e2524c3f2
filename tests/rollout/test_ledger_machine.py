"""State machines over the real registry and executor: no interleaving breaks the ledger."""

from __future__ import annotations

import logging
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import sdp_lightning as sdp
from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.rollout.factory import (
    create_capacity_modifiers,
    create_recomputer,
    create_staleness_strategy,
)
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.rollout.groups.ledger import StalenessManager
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import Row
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import versions_of
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.workflow import RolloutSession
from support.rollouts import (
    Samples as SamplesWorkflow,
    VersionScorer,
    assert_conserved,
    make_executor,
    make_segment,
    wait_until,
)

PICK = st.integers(0, 99)


class RegistryMachine(RuleBasedStateMachine):
    """Submit, sample, finish in any order, reject, fail, score, take, commit, serve.

    With ``overlap`` engines sample the version before (``served``) for a while after a commit, and
    whatever happens, happens then, too: the next batch is taken. ``scores``: every window is used.
    """

    on_overdue = "drop"

    @initialize(
        B=st.integers(1, 3),
        H=st.integers(0, 3),
        C=st.integers(1, 9),
        missing=st.sampled_from(["behavior", "drop"]),
        overlap=st.booleans(),
        scores=st.booleans(),
    )
    def start(self, B: int, H: int, C: int, missing: Any, overlap: bool, scores: bool) -> None:
        self.overlap, self.scores = overlap and H > 0, scores
        self.served, self.is_due = 0, False
        self.config = sdp.RolloutConfig(
            batch_size=B,
            max_head_lag=H,
            max_concurrent=C,
            missing_proximal=missing,
            on_overdue=self.on_overdue,  # type: ignore[arg-type]
            max_failures=10**6,
            max_rejected_in_a_row=10**6,
        )
        self.manager = StalenessManager(
            max_concurrent=C,
            batch_size=B,
            max_head_lag=H,
            modifiers=create_capacity_modifiers(self.config),
        )
        self.dropped: list[int] = []
        self.registry = GroupRegistry(
            self.config,
            create_staleness_strategy(self.config),
            self.manager,
            on_drop=lambda group: self.dropped.append(group.order),
        )
        self.recomputer = create_recomputer(self.config)
        self.version, self.in_training, self.num = 0, 0, 0
        self.running: list[tuple[InFlightGroup, Episode]] = []
        self.verdicts: dict[int, str] = {}
        self.registry.resume(0)

    def pick(self, index: int) -> tuple[InFlightGroup, Episode]:
        return self.running[index % len(self.running)]

    def end(self, group: InFlightGroup, verdict: str) -> None:
        assert group.order not in self.verdicts
        self.verdicts[group.order] = verdict
        self.running = [pair for pair in self.running if pair[0] is not group]

    @precondition(lambda self: self.manager.capacity(self.served) > 0)
    @rule(at_once=st.integers(1, 6))
    def submit(self, at_once: int) -> None:
        for _ in range(min(at_once, self.manager.capacity(self.served))):
            episode = Episode(FakeEngine(), SendGate())
            session = RolloutSession(None, lambda n, e=episode: e)  # type: ignore[arg-type, misc]
            session.open().add_context([1])
            group = InFlightGroup(self.num, PromptRow(0, self.num, {}), self.served, session)
            self.registry.add(group)
            self.running.append((group, episode))
            self.num += 1

    @precondition(lambda self: self.running)
    @rule(index=PICK)
    def sample(self, index: int) -> None:
        self.pick(index)[1]._append(make_segment(self.served))

    @precondition(lambda self: self.running)
    @rule(index=PICK, turn=st.booleans())
    def finish(self, index: int, turn: bool) -> None:
        group, episode = self.pick(index)
        if turn:
            episode.add_context([1])
        if not any(hasattr(part, "version") for part in episode.parts):
            episode._append(make_segment(self.served))
        self.registry.finish(group, group.make_group([episode.finish(0.0)]))
        self.end(group, "finished")

    @precondition(lambda self: self.running)
    @rule(index=PICK, fail=st.booleans())
    def lose(self, index: int, fail: bool) -> None:
        group, _ = self.pick(index)
        if fail:
            self.registry.record_failure(group, ValueError("x"))
        else:
            self.registry.reject(group, "reason")
        self.end(group, "lost")

    @precondition(lambda self: not self.in_training)
    @rule(score=st.booleans())
    def take(self, score: bool) -> None:
        batch = self.registry.take()
        assert len(batch) in (0, self.config.batch_size)
        orders = [group.order for group in batch]
        assert orders == sorted(orders)
        for group in batch:
            oldest = group.tail_version if self.on_overdue == "mask" else group.head_version
            assert oldest is not None and self.version - oldest <= self.config.max_head_lag
            assert self.verdicts[group.order] == "finished" and group.order not in self.dropped
            self.verdicts[group.order] = "trained"
            if self.scores and self.config.max_head_lag > 1:
                old = [s for s in group.segments if self.version - s.version >= 2]
                assert all(s.proximal.version == s.version + 1 for s in old), "missed its window"
        self.in_training = len(batch)
        if not batch and not self.running:
            assert self.manager.stat.pending < self.config.batch_size, "waits for nothing"
        self.is_due = score or self.scores
        self.score()

    def score(self) -> None:
        """Under the weights of ``version``, once all that ``version - 1`` sampled is there."""
        if self.is_due and self.served == self.version and self.recomputer is not None:
            self.recomputer.run(self.registry, VersionScorer(), self.version)
            self.is_due = False

    @precondition(lambda self: self.served < self.version)
    @rule()
    def serve(self) -> None:
        with pytest.raises(sdp.errors.VersionError, match="not served yet"):
            self.registry.commit(self.version + 1)
        self.registry.serve()
        self.served = self.version
        self.score()

    @precondition(lambda self: self.in_training and self.served == self.version)
    @rule(beside=st.booleans())
    def commit(self, beside: bool) -> None:
        self.version += 1
        overdue = self.registry.commit(self.version, served=not (beside and self.overlap))
        self.served = self.registry.clock.served
        for group in overdue:
            self.end(group, "overdue")
            assert group.order in self.dropped
            self.registry.finish(group, group.make_group([group.session.episodes[0].finish(0.0)]))
        self.in_training = 0

    @invariant()
    def the_ledger_is_conserved(self) -> None:
        stat = self.manager.stat
        ended = stat.pending + stat.consumed + stat.dropped + stat.rejected + stat.failed
        assert stat.submitted == self.num == stat.running + ended
        assert stat.running == len(self.running) and stat.dropped == len(self.dropped)
        assert len(set(self.dropped)) == len(self.dropped), "dropped twice"
        assert stat.consumed == list(self.verdicts.values()).count("trained")
        groups = [x for x in self.registry.snapshot() if not x.in_training]
        assert len(groups) == stat.running + stat.pending

    @invariant()
    def versions_are_those_of_the_tokens(self) -> None:
        for group, episode in self.running:
            assert group.versions == versions_of(episode.log)

    @invariant()
    def nothing_is_stuck(self) -> None:
        stat = self.manager.stat
        if not stat.running and stat.pending < self.config.batch_size and not self.in_training:
            assert self.manager.capacity(self.served) > 0 or self.served < self.version, stat

    @invariant()
    def waiting_drops_none(self) -> None:
        if self.on_overdue == "wait" and self.config.missing_proximal != "drop":
            assert not self.dropped


class ExecutorMachine(RuleBasedStateMachine):
    """The same through threads: the row's number says what becomes of it."""

    on_overdue = "drop"

    @initialize(
        B=st.integers(1, 3),
        H=st.integers(0, 3),
        C=st.integers(1, 6),
        requeue=st.booleans(),
        lost=st.integers(3, 7),
    )
    def start(self, B: int, H: int, C: int, requeue: bool, lost: int) -> None:
        def script(row: Row) -> str | None:
            if row["n"] % lost == 1:
                raise ValueError("lost")
            return "reject" if row["n"] % lost == 2 else None

        self.engine = FakeEngine(999, manual=True)
        self.executor = make_executor(
            self.engine,
            SamplesWorkflow(max_new_tokens=999, script=script),
            rows=[{"n": n} for n in range(1000)],
            batch_size=B,
            max_head_lag=H,
            max_concurrent=C,
            on_overdue=self.on_overdue,
            requeue_dropped=requeue,
            max_failures=10**6,
        )
        self.in_training = False
        self.executor.publish([], 0, reset=True)
        self.executor.resume()

    def teardown(self) -> None:
        if hasattr(self, "executor"):
            self.executor.close()

    def settle(self) -> None:
        """Until nothing moves by itself: all capacity is used, and every row has been sent."""
        executor = self.executor

        def is_full() -> bool:
            return executor.manager.capacity(executor.version) == 0

        wait_until(executor, is_full)
        self.engine.wait_for_requests(executor.stat.running, total=executor.stat.submitted)

    @rule(index=PICK)
    def sample(self, index: int) -> None:
        self.settle()
        if running := self.executor.stat.running:
            self.engine.advance(1, only=index % running, awaiting=running)

    @rule(index=PICK)
    def finish(self, index: int) -> None:
        self.settle()
        stat = self.executor.stat
        if stat.running:
            self.engine.advance(999, only=index % stat.running, awaiting=stat.running)
            ended = stat.submitted - stat.running
            wait_until(
                self.executor,
                lambda: self.executor.stat.submitted - self.executor.stat.running > ended,
            )

    @precondition(lambda self: not self.in_training)
    @rule()
    def take(self) -> None:
        self.settle()
        executor = self.executor
        try:
            batch = executor.take(timeout_s=0)
        except sdp.errors.RolloutTimeout:
            return
        assert batch is not None
        self.in_training = True
        for group in batch:
            oldest = group.tail_version if self.on_overdue == "mask" else group.head_version
            assert oldest is not None
            assert executor.version - oldest <= executor.config.max_head_lag

    @precondition(lambda self: self.in_training)
    @rule()
    def publish(self) -> None:
        self.executor.publish([], self.executor.version + 1)
        self.in_training = False

    @invariant()
    def the_ledger_is_conserved_and_nothing_is_stuck(self) -> None:
        if not hasattr(self, "executor"):
            return
        assert_conserved(self.executor)
        self.settle()
        stat = self.executor.stat
        assert stat.running or self.in_training or stat.pending >= self.executor.config.batch_size
        if self.on_overdue == "wait":
            assert not stat.dropped


MODES = ["drop", "wait", "mask"]


@pytest.mark.parametrize("mode", MODES)
def test_no_interleaving_of_transitions_breaks_the_registry(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults: one drop compensated twice, another never; compensation that deadlocks later."""
    caplog.set_level(logging.ERROR, logger="sdp_lightning")
    machine = type("Machine", (RegistryMachine,), {"on_overdue": mode})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=120, stateful_step_count=60, deadline=None)
    )


@pytest.mark.parametrize("mode", MODES)
def test_no_interleaving_of_events_breaks_the_executor(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="sdp_lightning")
    machine = type("Machine", (ExecutorMachine,), {"on_overdue": mode})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
