"""The shipped fake obeys the engine protocol, and shows a wrong stamp in its numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from sdp_lightning.engines.protocol import GenerationRequest, InferenceEngine
from sdp_lightning.errors import EngineError, VersionError
from sdp_lightning.testing import FakeEngine
from sdp_lightning.types import SamplingParams, Segment


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def request(budget: int = 8, *, tokens: list[int] | None = None, seed: int = 0) -> Any:
    params = SamplingParams(max_new_tokens=budget)
    return GenerationRequest(np.array(tokens or [1, 2]), params, seed=seed)


async def until_in_flight(engine: FakeEngine, count: int) -> None:
    for _ in range(1000):  # turns of the loop, not time
        if engine.num_in_flight == count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{engine.num_in_flight} requests are in flight, never {count}")


def test_it_fulfils_the_protocol() -> None:
    """Fault: a component calls a method that no implementation has, and mocks hide it."""
    engine: InferenceEngine = FakeEngine()
    engine.start()
    assert engine.version is None and engine.updates_in_flight and engine.num_generated == 0


@pytest.mark.parametrize(("budget", "reason"), [(8, "stop"), (5, "length"), (3, "length")])
def test_one_pass_is_one_segment_of_tokens_that_tell_their_place(budget: int, reason: str) -> None:
    async def main() -> None:
        engine, got = FakeEngine(reply=5, chunks=2), list[Segment]()
        engine.update_weights([], 4, reset=True)
        assert await engine.generate(request(budget), got.append) == reason
        (segment,) = got
        n = min(budget, 5)
        assert segment.token_ids.tolist() == [(2 + i) % 7 + 3 for i in range(n)]
        assert segment.version == 4 and np.allclose(segment.logprobs, -0.5)
        assert engine.num_generated == n and engine.num_in_flight == 0

    run(main)


def test_in_process_an_update_splits_the_segment_where_weights_changed() -> None:
    async def main() -> None:
        engine, got = FakeEngine(reply=6, manual=True), list[Segment]()
        engine.update_weights([], 0, reset=True)
        reply = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        engine.advance(2, awaiting=1)
        engine.pause()
        engine.advance(5, awaiting=1)  # paused: nothing
        engine.update_weights([], 1)
        assert [(s.version, len(s)) for s in got] == [(0, 2)], "handed over when it returns"
        engine.resume()
        engine.advance(9, awaiting=1)
        assert await reply == "stop"
        assert [(s.version, len(s)) for s in got] == [(0, 2), (1, 4)]

    run(main)


def test_as_a_server_it_interrupts_at_pause_and_goes_on_when_resent() -> None:
    async def main() -> None:
        engine, got = FakeEngine(reply=6, manual=True, updates_in_flight=False), list[Segment]()
        engine.update_weights([], 0, reset=True)
        reply = asyncio.ensure_future(engine.generate(request(8), got.append))
        await until_in_flight(engine, 1)
        engine.advance(2, awaiting=1)
        engine.pause()
        assert await reply == "abort" and len(got) == 1
        engine.update_weights([], 1)
        engine.resume()
        resent = request(6, tokens=[1, 2, *got[0].token_ids.tolist()])
        reply = asyncio.ensure_future(engine.generate(resent, got.append))
        await until_in_flight(engine, 1)
        engine.advance(99, awaiting=1)
        assert await reply == "stop"
        assert [(s.version, len(s)) for s in got] == [(0, 2), (1, 4)], "6 in all"

    run(main)


def test_as_a_server_it_refuses_new_weights_under_running_requests() -> None:
    """Fault: weights reloaded under running requests."""

    async def main() -> None:
        engine = FakeEngine(manual=True, updates_in_flight=False)
        engine.update_weights([], 0, reset=True)
        reply = asyncio.ensure_future(engine.generate(request(), lambda segment: None))
        await until_in_flight(engine, 1)
        engine.advance(1, awaiting=1)
        with pytest.raises(EngineError, match=r"pause\(\) must come first"):
            engine.update_weights([], 1)
        engine.pause()
        engine.update_weights([], 1)
        assert await reply == "abort"

    run(main)


@pytest.mark.parametrize("updates_in_flight", [True, False])
def test_nothing_is_sampled_before_the_first_update_or_while_paused(
    updates_in_flight: bool,
) -> None:
    async def main() -> None:
        engine, got = FakeEngine(updates_in_flight=updates_in_flight), list[Segment]()
        reply = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.num_generated == 0
        engine.update_weights([], 3, reset=True)
        assert await reply == "stop" and got[0].version == 3

    run(main)


def test_a_waiting_reply_goes_on_at_resume_without_polling() -> None:
    async def main() -> None:
        engine, got = FakeEngine(), list[Segment]()
        engine.update_weights([], 0, reset=True)
        engine.pause()
        reply = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        await asyncio.sleep(0)
        engine.resume()
        assert await reply == "stop"

    run(main)


def test_versions_advance_by_one_and_a_refused_update_changes_nothing() -> None:
    engine = FakeEngine()
    for version in (0, 1):
        with pytest.raises(VersionError, match=f"has no version yet; cannot commit {version}"):
            engine.update_weights([], version)
    engine.update_weights([], 7, reset=True)
    for version in (0, 7, 9):
        with pytest.raises(VersionError, match=f"is at version 7; cannot commit {version}"):
            engine.update_weights([], version)

    def broken() -> Any:
        yield "a", np.zeros(3, dtype=np.float32)
        raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        engine.update_weights(broken(), 8)
    assert engine.version == 7
    report = engine.update_weights([("w", np.zeros(3, dtype=np.float32))], 8)  # type: ignore[list-item]
    assert (report.version, report.num_bytes) == (8, 12)
    assert engine.published == [(7, ()), (8, ("w",))]


@pytest.mark.parametrize("end", ["close", "fail"])
@pytest.mark.parametrize("manual", [True, False])
def test_an_end_fails_what_is_out_and_what_comes(end: str, manual: bool) -> None:
    async def main() -> None:
        engine = FakeEngine(manual=manual)
        reply = asyncio.ensure_future(engine.generate(request(), lambda segment: None))
        await until_in_flight(engine, 1)
        await asyncio.sleep(0)
        if end == "close":
            engine.close()
            engine.close()
        else:
            engine.fail("out of memory")
        message = "closed" if end == "close" else "out of memory"
        with pytest.raises(EngineError, match=message):
            await reply
        with pytest.raises(EngineError, match=message):
            await engine.generate(request(), lambda segment: None)
        with pytest.raises(EngineError, match=message):
            engine.update_weights([], 0, reset=True)

    run(main)


def test_a_cancelled_request_is_forgotten_and_the_same_one_starts_again() -> None:
    async def main() -> None:
        engine, got = FakeEngine(reply=3, manual=True), list[Segment]()
        engine.update_weights([], 0, reset=True)
        reply = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        engine.advance(2, awaiting=1)
        reply.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reply
        assert engine.num_in_flight == 0 and not got
        reply = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        engine.advance(9, awaiting=1)
        assert await reply == "stop" and [len(s) for s in got] == [3]

    run(main)


def test_waiting_for_requests_ends_at_its_deadline() -> None:
    FakeEngine().wait_for_requests(0)
    with pytest.raises(EngineError, match="waited 0 s for 1 requests, 0 are in flight"):
        FakeEngine().wait_for_requests(1, timeout_s=0)


def test_advance_waits_for_the_requests_that_it_is_told_to_await() -> None:
    """Fault: sampling comes before the requests, and then nothing comes for ever."""
    engine, got = FakeEngine(manual=True), list[Segment]()
    engine.update_weights([], 0, reset=True)
    with pytest.raises(EngineError, match="waited 0 s for 2 requests, 0 are in flight"):
        engine.advance(9, awaiting=2, timeout_s=0)
    engine.advance(9, awaiting=None)

    async def main() -> None:
        sampled = asyncio.ensure_future(asyncio.to_thread(engine.advance, 9, awaiting=2))
        first = asyncio.ensure_future(engine.generate(request(), got.append))
        await until_in_flight(engine, 1)
        assert engine.num_generated == 0
        await engine.generate(request(seed=1), got.append)
        await asyncio.gather(sampled, first)

    run(main)
    assert [len(segment) for segment in got] == [4, 4]
