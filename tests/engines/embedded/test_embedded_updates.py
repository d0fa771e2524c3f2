import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sdp_lightning.errors import EngineError, VersionError
from sdp_lightning.testing import tiny_model
from sdp_lightning.types import Segment
from support.embedded_engines import (
    PATIENCE_S,
    Control,
    MakeEngine,
    engine_maker,
    full_logprobs,
    generate,
    launch,
    prompts,
    request,
    run,
    tokens_of,
)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


def interrupted(make_engine, kv_on_update: str):
    """Nine requests, cut by an update after five tokens each."""
    control, old, new = Control(), tiny_model(), tiny_model(seed=1)
    engine = make_engine(control.watch(tiny_model()), kv_on_update=kv_on_update)
    requests = [request(p, 12, seed=i) for i, p in enumerate([*prompts(7), [4, 5, 6], [4, 5, 6]])]

    async def scenario():
        control.arm(engine, pause_at=5)  # one prefill and four decode steps
        tasks, segments = await launch(engine, requests)
        await control.wait()
        report = await asyncio.to_thread(engine.update_weights, new.state_dict().items(), 1)
        delivered = [len(sink) for sink in segments]
        engine.resume()
        await asyncio.gather(*tasks)
        return report, delivered, segments

    report, delivered, segments = run(scenario())
    assert report.version == engine.version == 1 and report.transfer_s >= 0
    assert report.num_bytes == sum(4 * p.numel() for p in new.parameters())
    assert delivered == [1] * 9, "closed segments are with their sinks when the update returns"
    return old, new, requests, segments


def test_an_update_in_flight_cuts_segments_exactly_where_weights_changed(make_engine):
    old, new, requests, segments = interrupted(make_engine, "recompute")
    for one, (before, after) in zip(requests, segments, strict=True):
        assert (before.version, len(before)) == (0, 5)
        assert (after.version, len(after)) == (1, 7)
        prompt, tokens = one.token_ids, [*before.token_ids, *after.token_ids]
        np.testing.assert_allclose(
            before.logprobs, full_logprobs(old, prompt, tokens)[:5], atol=1e-5
        )
        np.testing.assert_allclose(
            after.logprobs, full_logprobs(new, prompt, tokens)[5:], atol=1e-5
        )


def test_under_keep_the_logprobs_after_an_update_belong_to_no_version(make_engine):
    old, new, requests, segments = interrupted(make_engine, "keep")
    for one, (before, after) in zip(requests, segments, strict=True):
        assert (before.version, after.version) == (0, 1)
        assert before.kv_on_update == after.kv_on_update == "keep"
        tokens = [*before.token_ids, *after.token_ids]
        for model in (old, new):
            expected = full_logprobs(model, one.token_ids, tokens)
            assert np.abs(after.logprobs - expected[5:]).max() > 1e-3


def test_an_update_to_the_same_weights_changes_no_token(make_engine):
    model, control = tiny_model(), Control()
    engine = make_engine(control.watch(tiny_model()))
    requests = [request(p, 12, seed=i) for i, p in enumerate(prompts(5))]

    async def scenario():
        control.arm(engine, pause_at=5)
        tasks, segments = await launch(engine, requests)
        await control.wait()
        await asyncio.to_thread(engine.update_weights, model.state_dict().items(), 1)
        engine.resume()
        await asyncio.gather(*tasks)
        return segments

    cut = run(scenario())
    _, whole = generate(make_engine(model), requests)
    assert [len(s) for s in cut] == [2] * 5
    assert [tokens_of(s) for s in cut] == [tokens_of(s) for s in whole]


def test_a_part_of_the_weights_may_be_sent_after_the_first_time(make_engine):
    model, other = tiny_model(), tiny_model(seed=1)
    engine = make_engine(model)
    name = "model.layers.0.mlp.up_proj.weight"
    report = engine.update_weights([(name, other.state_dict()[name])], 1)
    assert report.num_bytes == 4 * other.state_dict()[name].numel()
    model.load_state_dict({name: other.state_dict()[name]}, strict=False)
    _, ((segment,),) = generate(engine, [request([5, 6])])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_a_tied_weight_may_be_sent_under_either_name(make_engine, absent: str | None):
    model = tiny_model(seed=1)
    engine = make_engine(tiny_model(), publish=False)
    weights = {name: w for name, w in model.state_dict().items() if name != absent}
    engine.update_weights(weights.items(), 0, reset=True)
    _, ((segment,),) = generate(engine, [request([5, 6])])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_the_trainers_module_is_copied_not_shared(make_engine):
    model = tiny_model()
    before = model.config._attn_implementation
    engine = make_engine(model)
    _, first = generate(engine, [request([5, 6])])
    with torch.no_grad():
        model.model.norm.weight.zero_()
    _, second = generate(engine, [request([5, 6])])
    assert tokens_of(first[0]) == tokens_of(second[0])
    assert model.config._attn_implementation == before and model.model.norm.weight.requires_grad


def weights_with(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None):
    weights = dict(tiny_model(tie_word_embeddings=False).state_dict())
    value = weights.pop(name, torch.zeros(1))
    return weights.items() if change is None else [*weights.items(), (name, change(value))]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (weights_with("no.such.weight", lambda w: w), "no weights named no.such.weight"),
        (weights_with("model.norm.weight", lambda w: w[:3]), r"\(3,\).*\(32,\)"),
        (weights_with("model.norm.weight", None), "model.norm.weight are missing"),
        ([*weights_with("x", None), ("model.norm.weight", torch.ones(32))], "sent twice"),
    ],
    ids=["an unknown name", "another shape", "a missing name", "a name sent twice"],
)
@pytest.mark.fault("corrupted data", "publish")
def test_weights_that_do_not_fit_leave_the_engine_as_it_was(make_engine, weights, message: str):
    model = tiny_model(tie_word_embeddings=False, seed=3)
    engine = make_engine(model)
    with pytest.raises(EngineError, match=message):
        engine.update_weights(weights, 1, reset=True)
    assert engine.version == 0
    _, ((segment,),) = generate(engine, [request([5, 6])])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_tied_weights_with_two_values_are_refused(make_engine):
    engine = make_engine(tiny_model())
    with pytest.raises(EngineError, match="one tied tensor"):
        engine.update_weights(tiny_model(tie_word_embeddings=False).state_dict().items(), 1)


@pytest.mark.parametrize("version", [0, 2, 7])
def test_a_version_that_is_not_the_next_is_refused_by_both_numbers(make_engine, version: int):
    engine = make_engine()
    with pytest.raises(VersionError, match=f"at version 0; cannot commit {version}.*reset=True"):
        engine.update_weights([], version)
    assert engine.version == 0


def test_reset_takes_any_version_and_nothing_but_reset_begins(make_engine):
    engine = make_engine(publish=False)
    with pytest.raises(VersionError, match="no version yet; cannot commit 0"):
        engine.update_weights(tiny_model().state_dict().items(), 0)
    with pytest.raises(VersionError, match="integer of 0 or more"):
        engine.update_weights(tiny_model().state_dict().items(), -1, reset=True)
    assert engine.version is None
    for version in (41, 7):
        engine.update_weights(tiny_model().state_dict().items(), version, reset=True)
        assert engine.version == version
    _, ((segment,),) = generate(engine, [request([5, 6])])
    assert segment.version == 7


def test_nothing_is_sampled_before_the_first_update_nor_while_paused(make_engine):
    control, model = Control(), tiny_model()
    engine = make_engine(control.watch(tiny_model()), publish=False)
    control.arm(engine)

    async def scenario():
        sink: list[Segment] = []
        task = asyncio.create_task(engine.generate(request([5, 6]), sink.append))
        await asyncio.sleep(0.05)
        assert control.num_forwards == 0
        engine.pause()
        engine.pause()
        engine.update_weights(model.state_dict().items(), 0, reset=True)
        await asyncio.sleep(0.05)
        assert control.num_forwards == 0 and not sink, "an update does not end a pause"
        engine.resume()
        engine.resume()
        return await task

    assert run(scenario()) == "length"


def test_requests_in_flight_keep_their_slots_through_an_update(make_engine):
    control, model = Control(), tiny_model()
    engine = make_engine(control.watch(tiny_model()), max_slots=2)
    finished: list[int] = []

    async def scenario():
        control.arm(engine, pause_at=3)
        requests = [request([5, 6 + i], budget) for i, budget in enumerate((10, 11, 1))]
        tasks, _ = await launch(engine, requests)
        for index, task in enumerate(tasks):
            task.add_done_callback(lambda _, index=index: finished.append(index))
        await control.wait()
        await asyncio.to_thread(engine.update_weights, model.state_dict().items(), 1)
        engine.resume()
        await asyncio.gather(*tasks)

    run(scenario())
    assert finished == [0, 2, 1], "the one that waited begins when the first slot is free"


def test_weights_change_only_between_steps(make_engine):
    entered, released = threading.Event(), threading.Event()
    model, armed = tiny_model(), threading.Event()

    def block(module, args) -> None:
        if armed.is_set():
            entered.set()
            assert released.wait(PATIENCE_S)

    model.register_forward_pre_hook(block)
    engine = make_engine(model)

    async def scenario():
        armed.set()
        task = asyncio.create_task(engine.generate(request([5, 6]), [].append))
        await asyncio.to_thread(entered.wait, PATIENCE_S)
        new = tiny_model(seed=1).state_dict().items()
        update = asyncio.create_task(asyncio.to_thread(engine.update_weights, new, 1))
        await asyncio.wait([update], timeout=0.2)
        assert not update.done() and engine.version == 0
        released.set()
        await asyncio.gather(update, task)

    run(scenario())
