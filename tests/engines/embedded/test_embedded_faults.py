import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.embedded.decode_loop import DecodeLoop
from sdp_lightning.errors import EngineError
from sdp_lightning.testing import tiny_model
from sdp_lightning.types import Segment
from support.embedded_engines import (
    VOCABULARY,
    Control,
    MakeEngine,
    engine_maker,
    engine_threads,
    generate,
    launch,
    request,
    run,
)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


@pytest.mark.parametrize(
    ("tokens", "budget", "message"),
    [
        (list(range(3, 13)), 55, "10 tokens and max_new_tokens=55 .* max_length=64"),
        ([5, VOCABULARY], 4, f"from 5 to {VOCABULARY}.*has {VOCABULARY}"),
        ([-1, 5], 4, "from -1 to 5"),
        ([[5, 6]], 4, r"shape \(1, 2\)"),
        ([0.5], 4, "float64"),
    ],
    ids=["too long", "beyond the vocabulary", "negative", "two rows", "not integers"],
)
@pytest.mark.fault("corrupted data", "generate")
def test_a_request_that_cannot_be_served_fails_alone(make_engine, tokens, budget: int, message):
    engine = make_engine(max_length=64)

    async def scenario():
        good, bad = request([5, 6], 62), request(tokens, budget)
        (one, other), _ = await launch(engine, [good, bad])
        with pytest.raises(EngineError, match=message):
            await other
        return await one

    assert run(scenario()) == "length"


@pytest.mark.fault("exception", "generate")
def test_a_sink_that_raises_fails_its_own_request_only(make_engine):
    engine = make_engine(max_slots=2)

    def broken(segment: Segment) -> None:
        raise ValueError("disk full")

    async def scenario():
        sinks = [broken, [].append, [].append]
        outcomes = [engine.generate(request([5, 6 + i], 4), sink) for i, sink in enumerate(sinks)]
        return await asyncio.gather(*outcomes, return_exceptions=True)

    failed, *others = run(scenario())
    assert isinstance(failed, EngineError) and isinstance(failed.__cause__, ValueError)
    assert others == ["length", "length"]
    assert engine.num_active == 0


@pytest.mark.fault("exception", "generate")
def test_a_sink_that_raises_during_an_update_frees_its_slot(make_engine):
    control, model = Control(), tiny_model()
    engine = make_engine(control.watch(tiny_model()), max_slots=1)

    def broken(segment: Segment) -> None:
        raise ValueError("disk full")

    async def scenario():
        control.arm(engine, pause_at=2)
        bad = asyncio.create_task(engine.generate(request([5, 6], 40), broken))
        await control.wait()
        await asyncio.to_thread(engine.update_weights, model.state_dict().items(), 1)
        with pytest.raises(EngineError, match="disk full"):
            await bad
        engine.resume()
        return await engine.generate(request([5, 6], 4), [].append)

    assert run(scenario()) == "length"
    assert engine.version == 1


def test_cancelling_frees_the_slot(make_engine):
    control = Control()
    engine = make_engine(control.watch(tiny_model()), max_slots=1)

    async def scenario():
        control.arm(engine, pause_at=2)
        (running, queued, last), segments = await launch(
            engine, [request([5, 6], 400), request([5, 7], 400), request([5, 8], 4)]
        )
        await control.wait()
        running.cancel()
        queued.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        engine.resume()
        return await last, segments

    reason, segments = run(scenario())
    assert reason == "length"
    assert [len(s) for s in segments] == [0, 0, 1]
    assert engine.num_active == 0 and engine.num_generated < 20


@pytest.mark.fault("hang", "teardown")
def test_close_fails_what_is_outstanding_and_leaves_no_thread(make_engine):
    control = Control()
    engine = make_engine(control.watch(tiny_model()), max_slots=2)

    async def scenario():
        control.arm(engine, pause_at=2)
        tasks, _ = await launch(engine, [request([5, 6 + i], 400) for i in range(4)])
        await control.wait()
        engine.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(scenario())
    assert all(isinstance(one, EngineError) and "closed" in str(one) for one in outcomes)
    assert not engine_threads()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.pause()
    with pytest.raises(EngineError, match="closed"):
        engine.start()
    with pytest.raises(EngineError, match="closed"):
        run(engine.generate(request([5]), [].append))


def every_later_call(engine: EmbeddedEngine) -> list[Callable[[], object]]:
    return [
        engine.start,
        engine.pause,
        engine.resume,
        lambda: engine.update_weights(tiny_model().state_dict().items(), 1),
        lambda: run(engine.generate(request([5]), [].append)),
    ]


@pytest.mark.fault("thread died", "generate")
@pytest.mark.fault("thread died", "publish")
def test_a_dead_decode_thread_reaches_every_request_present_and_future(make_engine):
    control = Control()
    engine = make_engine(control.watch(tiny_model()), max_slots=2)

    async def scenario():
        control.arm(engine, fail_at=3)
        tasks, _ = await launch(engine, [request([5, 6 + i], 40) for i in range(4)])
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(scenario())
    assert all(isinstance(one, EngineError) for one in outcomes)
    assert all(isinstance(one.__cause__, RuntimeError) for one in outcomes)
    for call in every_later_call(engine):
        with pytest.raises(EngineError, match="fell off the bus"):
            call()


@pytest.mark.fault("exception", "publish")
def test_a_copy_that_fails_half_way_makes_the_engine_unusable(make_engine):
    control = Control()
    engine = make_engine(control.watch(tiny_model()))
    weights = dict(tiny_model(seed=1).state_dict())
    weights["model.norm.weight"] = torch.empty(32, device="meta")  # cannot be read

    async def scenario():
        control.arm(engine, pause_at=2)
        (task,), segments = await launch(engine, [request([5, 6], 40)])
        await control.wait()
        with pytest.raises(EngineError, match="failed half way"):
            await asyncio.to_thread(engine.update_weights, weights.items(), 1)
        with pytest.raises(EngineError, match="unusable"):
            await task
        return segments

    ((segment,),) = run(scenario())
    assert segment.version == 0, "what the old weights sampled is still delivered"
    assert engine.version == 0
    for call in every_later_call(engine):
        with pytest.raises(EngineError, match="unusable"):
            call()


def test_an_engine_that_has_not_started_says_so():
    engine = EmbeddedEngine(tiny_model(), device="cpu")
    assert not engine_threads() and engine.version is None and engine.num_generated == 0
    with pytest.raises(EngineError, match=r"Call start\(\)"):
        engine.update_weights([], 0, reset=True)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.start()


def test_starting_twice_keeps_the_engine(make_engine):
    engine = make_engine()
    engine.start()
    assert engine.version == 0 and len(engine_threads()) == 1


def test_an_event_loop_that_is_gone_does_not_stop_the_others(make_engine):
    control = Control()
    engine = make_engine(control.watch(tiny_model()))
    control.arm(engine, pause_at=2)
    events = asyncio.new_event_loop()
    abandoned = events.create_task(engine.generate(request([5, 6], 8), [].append))
    events.run_until_complete(control.wait())
    events.run_until_complete(events.shutdown_default_executor())
    events.close()
    engine.resume()
    _, ((segment,),) = generate(engine, [request([5, 7], 20)])
    assert len(segment) == 20 and not abandoned.done()


@pytest.mark.fault("slow", "teardown")
def test_a_close_that_comes_while_a_burst_is_gathered_ends_the_thread(make_engine, monkeypatch):
    engine = make_engine()
    entered = threading.Event()

    def gather(loop: DecodeLoop) -> None:
        entered.set()
        with loop._changed:
            loop._changed.wait_for(lambda: loop._closing, 30)

    monkeypatch.setattr(DecodeLoop, "_gather", gather)
    monkeypatch.setattr("sdp_lightning.engines.embedded.decode_loop.CLOSE_DEADLINE_S", 5.0)
    engine.resume()  # wakes the idle thread
    assert entered.wait(30)
    engine.close()
    assert not engine_threads()
