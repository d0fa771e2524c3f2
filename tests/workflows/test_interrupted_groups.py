"""Groups that were under way when a checkpoint was written go on where they were."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import RolloutError
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.testing import FakeEngine, tiny_model
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow
from support.checkpoints import finished, running_in, through_a_file
from support.interrupted_groups import SETTINGS, halfway, resume, run_to_the_end
from support.rollouts import (
    DEADLINE_S,
    Samples,
    VersionScorer,
    assert_conserved,
    make_executor,
    rolling,
    versions,
    wait_until,
)


def test_groups_under_way_go_on_with_their_tokens_versions_scores_and_places() -> None:
    state, expected = halfway(Samples(max_new_tokens=8))
    engine = FakeEngine(reply=3, manual=True)
    with rolling(engine, Samples(max_new_tokens=8), start=False, **SETTINGS) as executor:
        resume(executor, state)
        assert executor.stat.running == 4 and executor.stat.consumed == 2
        engine.wait_for_requests(4)
        assert run_to_the_end(executor, engine) == expected
        assert engine.num_generated == 4 * 3, "nothing was sampled twice"
        group = finished(executor)[0]
        assert versions(group.trajectories[0]) == [0, 1, 2] and group.created_version == 0
        assert [s.proximal.version for s in group.segments] == [1, None, None]


def test_what_was_under_way_is_scored_before_its_workflow_has_repeated_it() -> None:
    """The window of version 1 is step 2, the first one after the resume."""

    class Late(Samples):
        async def run(self, row: Row, session: RolloutSession) -> list[Trajectory] | None:
            await asyncio.Event().wait()
            return None

    state, _ = halfway(Samples(max_new_tokens=8))
    with rolling(FakeEngine(), Late(), start=False, **SETTINGS) as executor:
        resume(executor, state)
        report = executor.recompute(VersionScorer())
        assert (report.num_segments, report.num_tokens) == (4, 8)
        again = running_in(executor.state_dict())
        assert [len(g["logs"][0]) for g in again] == [4] * 4, "and saved again, with its scores"
        assert all(g["logs"][0][-1]["proximal_version"] == 2 for g in again)


@pytest.mark.parametrize("moment", ["loaded", "published", "resumed", "closed"])
def test_a_second_interruption_loses_nothing(moment: str) -> None:
    state, expected = halfway(Samples(max_new_tokens=8))
    engine = FakeEngine(manual=True)
    with rolling(engine, Samples(max_new_tokens=8), start=False, **SETTINGS) as executor:
        executor.load_state_dict(state)
        if moment != "loaded":
            executor.publish([], 2, reset=True)
        if moment in ("resumed", "closed"):
            executor.resume()
            engine.wait_for_requests(4)
        if moment == "closed":
            executor.close()
        again = through_a_file(executor.state_dict())
    assert repr(again) == repr(state)
    engine = FakeEngine(reply=3, manual=True)
    with rolling(engine, Samples(max_new_tokens=8), start=False, **SETTINGS) as executor:
        resume(executor, again)
        assert run_to_the_end(executor, engine) == expected


class Turns(RolloutWorkflow):
    """Two samples of two turns each, at once; a subclass does something else somewhere."""

    sampling = SamplingParams(max_new_tokens=8)
    num_samples = 2

    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory]:
        return await asyncio.gather(*(self.sample(session) for _ in range(self.num_samples)))

    async def sample(self, session: RolloutSession) -> Trajectory:
        episode = session.open()
        episode.add_context([1, 2])
        await episode.generate(self.sampling)
        episode.add_context([5])
        await episode.generate(SamplingParams(max_new_tokens=8))
        return episode.finish(1.0)


class OtherPrompt(Turns):
    async def sample(self, session: RolloutSession) -> Trajectory:
        episode = session.open()
        episode.add_context([1, 3])
        await episode.generate(self.sampling)
        return episode.finish(1.0)


class OtherSettings(Turns):
    sampling = SamplingParams(max_new_tokens=7)


class OtherOrder(Turns):
    async def sample(self, session: RolloutSession) -> Trajectory:
        episode = session.open()
        for token in (1, 2):
            episode.add_context([token])
        await episode.generate(self.sampling)
        return episode.finish(1.0)


class FewerSamples(Turns):
    num_samples = 1


class EndsEarly(Turns):
    async def sample(self, session: RolloutSession) -> Trajectory:
        episode = session.open()
        episode.add_context([1, 2])
        await episode.generate(self.sampling)
        return episode.finish(1.0)


class Swallows(OtherPrompt):
    async def sample(self, session: RolloutSession) -> Trajectory:
        try:
            return await super().sample(session)
        except RolloutError:
            return await Turns().sample(session)


class Wraps(OtherPrompt):
    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory]:
        try:
            return await super().run(row, session)
        except RolloutError as error:
            raise ValueError("in a tool") from error


OTHERS = [OtherPrompt, OtherSettings, OtherOrder, FewerSamples, EndsEarly, Swallows, Wraps]


@pytest.fixture(scope="module")
def second_turn() -> dict[str, Any]:
    """4 groups at version 2, both samples in their second turn."""
    engine = FakeEngine(reply=8, manual=True)
    with rolling(engine, Turns(), **SETTINGS) as executor:
        engine.advance(3, awaiting=8)
        executor.publish([], 1)
        engine.advance(5, awaiting=8)
        engine.advance(3, awaiting=8)
        executor.publish([], 2)
        return through_a_file(executor.state_dict())


def test_several_samples_and_turns_are_repeated_at_once(second_turn: dict[str, Any]) -> None:
    engine = FakeEngine(reply=5)
    with rolling(engine, Turns(), start=False, **SETTINGS) as executor:
        resume(executor, second_turn)
        wait_until(executor, lambda: executor.stat.pending == 4)
        assert engine.num_requests == 8 and executor.telemetry.num_diverged == 0
        for group in finished(executor):
            assert [versions(t) for t in group.trajectories] == [[0, 1, 1, 2]] * 2
            assert [t.num_sampled for t in group.trajectories] == [16, 16]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.fault("corrupted data", "resume")
def test_a_workflow_that_does_something_else_samples_from_scratch_and_never_mixes(
    other: type[Turns], second_turn: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(reply=8)
    with rolling(engine, other(), start=False, **SETTINGS) as executor:
        resume(executor, second_turn)
        wait_until(executor, lambda: executor.stat.pending == 4)
        groups = finished(executor)
        assert {s.version for g in groups for s in g.segments} == {2}, "saved tokens are gone"
        assert [g.order for g in groups] == [0, 1, 2, 3]
        assert {g.created_version for g in groups} == {2}
        assert executor.telemetry.num_diverged == 4 and executor.stat.submitted == 2 + 4
        assert_conserved(executor)
    said = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and "did not repeat its steps in the checkpoint for row" in said[0]


class Breaks(Turns):
    async def sample(self, session: RolloutSession) -> Trajectory:
        session.open().add_context([1, 2])
        raise ZeroDivisionError("in a reward")


@pytest.mark.fault("exception", "resume")
def test_a_workflow_that_fails_while_it_repeats_has_failed(second_turn: dict[str, Any]) -> None:
    with rolling(FakeEngine(), Breaks(), start=False, **SETTINGS) as executor:
        resume(executor, second_turn)
        with pytest.raises(RolloutError, match=r"'row0'.*in a reward"):
            executor.take()
        assert executor.stat.failed >= 1 and executor.telemetry.num_diverged == 0


@pytest.mark.parametrize("requeue", [False, True])
def test_groups_under_way_that_are_stale_at_the_resume_are_dropped_and_counted(
    requeue: bool,
) -> None:
    state, _ = halfway(Samples(max_new_tokens=8))
    settings = SETTINGS | {"requeue_dropped": requeue}
    with rolling(FakeEngine(), start=False, **settings) as executor:
        resume(executor, state, version=4)
        stat = executor.stat
        assert (stat.dropped, executor.telemetry.num_overdue) == (4, 4)
        assert executor.telemetry.dropped_tokens == 4 * 5
        rows = [g.row_id for g in executor.take() or []]
        assert rows == (["row0"] if requeue else [])


@pytest.mark.fault("slow", "resume")
def test_with_less_capacity_groups_wait_for_it_before_any_new_row() -> None:
    state, _ = halfway(Samples(max_new_tokens=8))
    settings, orders = SETTINGS | {"max_concurrent": 1}, list[int]()
    with rolling(FakeEngine(), Samples(max_new_tokens=8), start=False, **settings) as executor:
        resume(executor, state)
        while batch := executor.take():
            orders += [g.order for g in batch]
    assert orders == [0, 1, 2, 3]


def test_groups_that_wait_for_capacity_go_stale_as_others_do() -> None:
    state, _ = halfway(Samples(max_new_tokens=8))
    engine, settings = FakeEngine(manual=True), SETTINGS | {"max_concurrent": 1}
    with rolling(engine, Samples(max_new_tokens=8), start=False, **settings) as executor:
        resume(executor, state)
        executor.publish([], 3)
        assert executor.stat.dropped == 0
        executor.publish([], 4)
        assert executor.stat.dropped == 4 and running_in(executor.state_dict()) == []
        assert executor.take() is None


def test_the_embedded_engine_goes_on_as_if_nothing_had_happened() -> None:
    """The token at position p comes from (seed, p), so it is the one that would have been."""
    weights = [list(tiny_model(seed=s).state_dict().items()) for s in (0, 1)]
    workflow = Samples(max_new_tokens=200)

    def make() -> tuple[EmbeddedEngine, WorkflowExecutor]:
        engine = EmbeddedEngine(tiny_model(seed=0), device="cpu", max_slots=4)
        engine.start()
        return engine, make_executor(engine, workflow, **SETTINGS)

    engine, executor = make()
    try:
        executor.publish(weights[0], 0, reset=True)
        executor.resume()
        wait_for_tokens(engine, 60)
        executor.publish(weights[1], 1)
        state = through_a_file(executor.state_dict())
        wait_until(executor, lambda: executor.stat.pending == 4)
        expected = finished(executor)
    finally:
        executor.close()
        engine.close()
    engine, executor = make()
    try:
        executor.load_state_dict(state)
        executor.publish(weights[1], 1, reset=True)
        executor.resume()
        wait_until(executor, lambda: executor.stat.pending == 4)
        for one, other in zip(finished(executor), expected, strict=True):
            found, wanted = one.trajectories[0], other.trajectories[0]
            assert versions(found) == versions(wanted) == [0, 1]
            assert np.array_equal(found.token_ids, wanted.token_ids)
            for a, b in zip(found.segments, wanted.segments, strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        saved = sum(len(e["token_ids"]) for g in running_in(state) for e in g["logs"][0][2:])
        assert engine.num_generated == 4 * 200 - saved, "only what was missing"
    finally:
        executor.close()
        engine.close()


def wait_for_tokens(engine: EmbeddedEngine, count: int) -> None:
    async def poll() -> None:
        while engine.num_generated < count:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(poll(), DEADLINE_S))
