"""CONTRACT section 5: every token is stamped once, in order, to the original budget."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from sdp_lightning.engines.protocol import GenerationRequest, SegmentSink
from sdp_lightning.errors import EngineError, RolloutError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import FinishReason, SamplingParams, Segment
from sdp_lightning.workflows import episode as episode_module
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.send_gate import SendGate

PROMPT = [1, 2, 3]


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def segments(episode: Episode) -> list[tuple[int, int]]:
    return [(p.version, len(p)) for p in episode.parts if isinstance(p, Segment)]


def begin(engine: FakeEngine, budget: int = 8) -> tuple[Episode, asyncio.Future[FinishReason]]:
    episode = Episode(engine, SendGate())
    episode.add_context(PROMPT)
    params = SamplingParams(max_new_tokens=budget)
    return episode, asyncio.ensure_future(episode.generate(params))


async def until_in_flight(engine: FakeEngine, count: int) -> None:
    for _ in range(1000):  # turns of the loop, not time
        if engine.num_in_flight == count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{engine.num_in_flight} requests are in flight, never {count}")


@dataclass
class ScriptedEngine:
    """Answers each request by the next (tokens, reason) of a script; ``FakeEngine`` for the rest.

    It tells a token its version from the number of requests before it, so that stamps show.
    """

    script: Iterator[tuple[list[int], FinishReason]]

    def __post_init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        tokens, reason = next(self.script)
        if tokens:
            sink(Segment(len(self.requests), tokens, [-0.5] * len(tokens)))
        self.requests.append(request)
        return reason


def scripted(*script: tuple[list[int], FinishReason]) -> tuple[Episode, ScriptedEngine]:
    engine = ScriptedEngine(iter(script))
    episode = Episode(engine, SendGate(), seed=5, group_key="g")  # type: ignore[arg-type]
    episode.add_context(PROMPT)
    return episode, engine


def test_one_pass_is_one_segment_of_the_version_that_sampled_it() -> None:
    async def main() -> None:
        engine = FakeEngine(reply=4)
        engine.update_weights([], 3, reset=True)
        episode, reply = begin(engine)
        assert await reply == "stop" and segments(episode) == [(3, 4)]
        trajectory = episode.finish(0.5)
        assert trajectory.parts == episode.parts and trajectory.reward == 0.5
        assert trajectory.segments[0] is episode.parts[1], "the very segments, slots and all"

    run(main)


@given(st.lists(st.integers(0, 4), max_size=8), st.integers(1, 12), st.booleans())
def test_interruptions_at_any_point_keep_budget_order_and_stamps(
    chunks: list[int], budget: int, updates_in_flight: bool
) -> None:
    """Fault: loop bound on the already decremented budget after an abort."""

    async def main() -> None:
        engine = FakeEngine(reply=budget, manual=True, updates_in_flight=updates_in_flight)
        engine.update_weights([], 0, reset=True)
        episode, reply = begin(engine, budget)
        stamps: list[int] = []
        for version, chunk in enumerate(chunks):
            num_left = int(len(stamps) < budget)
            await until_in_flight(engine, num_left)
            engine.advance(chunk, awaiting=num_left)
            stamps += [version] * min(chunk, budget - len(stamps))
            engine.pause()
            if not updates_in_flight:
                await until_in_flight(engine, 0)
            engine.update_weights([], version + 1)
            engine.resume()
            for _ in range(5):
                await asyncio.sleep(0)
        num_left = int(len(stamps) < budget)
        stamps += [len(chunks)] * (budget - len(stamps))
        await until_in_flight(engine, num_left)
        engine.advance(budget, awaiting=num_left)
        assert await reply == "length"
        got = [p for p in episode.parts if isinstance(p, Segment)]
        assert [s.version for s in got for _ in range(len(s))] == stamps
        places = np.concatenate([s.token_ids for s in got])
        assert places.tolist() == [(3 + i) % 7 + 3 for i in range(budget)], "none lost, none twice"
        assert all(np.allclose(s.logprobs, -(s.version + 1) / 10) for s in got)

    run(main)


def test_the_label_is_the_generating_version_although_the_answer_comes_after_the_publish() -> None:
    """Fault: version read after the response."""

    async def main() -> None:
        engine = FakeEngine(reply=4, manual=True)
        engine.update_weights([], 0, reset=True)
        episode, reply = begin(engine)
        await until_in_flight(engine, 1)
        engine.advance(4, awaiting=1)  # ended, but the loop has not handled it yet
        engine.update_weights([], 1)
        assert not reply.done() and segments(episode) == [(0, 4)]
        assert await reply == "stop" and segments(episode) == [(0, 4)]

    run(main)


def test_an_abort_before_the_first_token_makes_no_empty_segment() -> None:
    episode, engine = scripted(([], "abort"), ([], "abort"), ([7, 8], "stop"))
    assert run(lambda: episode.generate(SamplingParams(max_new_tokens=4))) == "stop"
    assert segments(episode) == [(2, 2)] and len(engine.requests) == 3


def test_what_is_resent_holds_all_tokens_the_rest_of_the_budget_and_the_same_seed() -> None:
    episode, engine = scripted(([7, 8, 9], "abort"), ([6], "abort"), ([5], "length"))
    assert run(lambda: episode.generate(SamplingParams(max_new_tokens=5))) == "length"
    asked = [(r.token_ids.tolist(), r.params.max_new_tokens) for r in engine.requests]
    assert asked == [(PROMPT, 5), ([*PROMPT, 7, 8, 9], 2), ([*PROMPT, 7, 8, 9, 6], 1)]
    assert {(r.seed, r.group_key) for r in engine.requests} == {(5, "g")}


@pytest.mark.parametrize(
    ("tokens", "stops", "reason"),
    [
        pytest.param([7, 0], (0,), "stop", id="on a stop token it has stopped"),
        pytest.param([7, 8, 9, 6], (), "length", id="with the budget used up it is full"),
    ],
)
def test_a_request_interrupted_at_its_very_end_is_not_resent(
    tokens: list[int], stops: tuple[int, ...], reason: str
) -> None:
    episode, engine = scripted((tokens, "abort"))
    params = SamplingParams(max_new_tokens=4, stop_token_ids=stops)
    assert run(lambda: episode.generate(params)) == reason
    assert len(engine.requests) == 1 and episode.finish(0).finish_reason == reason


def test_a_stop_token_of_the_context_does_not_end_an_interrupted_request() -> None:
    episode, _ = scripted(([], "abort"), ([9], "stop"))
    params = SamplingParams(max_new_tokens=4, stop_token_ids=(3,))
    run(lambda: episode.generate(params))
    assert segments(episode) == [(1, 1)]


def test_several_turns_each_have_their_own_budget() -> None:
    async def main() -> None:
        engine = FakeEngine(reply=9)
        engine.update_weights([], 0, reset=True)
        episode = Episode(engine, SendGate())
        for n in (2, 3):
            episode.add_context(PROMPT)
            assert await episode.generate(SamplingParams(max_new_tokens=n)) == "length"
        assert segments(episode) == [(0, 2), (0, 3)]
        assert episode.sampled_token_ids.size == 5 and episode.token_ids.size == 11

    run(main)


@pytest.mark.fault("corrupted data", "generate")
def test_more_tokens_than_asked_for_are_an_error() -> None:
    episode, _ = scripted(([1, 2, 3], "stop"))
    with pytest.raises(RolloutError, match="1 tokens beyond the budget"):
        run(lambda: episode.generate(SamplingParams(max_new_tokens=2)))


@pytest.mark.fault("hang", "generate")
def test_an_engine_that_only_interrupts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_module, "MAX_EMPTY_INTERRUPTIONS", 3)
    episode, engine = scripted(*[([], "abort")] * 9)
    with pytest.raises(RolloutError, match="4 times without one new token"):
        run(lambda: episode.generate(SamplingParams(max_new_tokens=2)))
    assert len(engine.requests) == 4


def test_generating_without_a_context_is_an_error() -> None:
    episode = Episode(FakeEngine(), SendGate())
    assert episode.sampled_token_ids.size == 0
    with pytest.raises(RolloutError, match="needs a context first"):
        run(lambda: episode.generate(SamplingParams()))


@pytest.mark.fault("exception", "generate")
def test_an_engine_error_reaches_the_workflow() -> None:
    async def main() -> None:
        engine = FakeEngine(manual=True)
        engine.update_weights([], 0, reset=True)
        _, reply = begin(engine)
        await until_in_flight(engine, 1)
        engine.fail("out of memory")
        with pytest.raises(EngineError, match="out of memory"):
            await reply

    run(main)
