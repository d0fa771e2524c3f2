"""The embedded engine stops at the token that completes a stop text, also across an update."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sdp_lightning.testing import tiny_model, tiny_tokenizer
from sdp_lightning.workflows.stop_texts import StopTexts
from support.embedded_engines import (
    Control,
    MakeEngine,
    engine_maker,
    generate,
    launch,
    prompts,
    request,
    run,
    tokens_of,
)

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


def stopping(one, text: str):
    return replace(one, stops=StopTexts((text,), TOKENIZER.decode))


def first_end(tokens: list[int], text: str) -> int:
    return next(n for n in range(len(tokens) + 1) if text in TOKENIZER.decode(tokens[:n]))


def test_each_completion_is_what_it_was_up_to_its_text(make_engine):
    engine = make_engine()
    requests = [request(p, 24, seed=i) for i, p in enumerate(prompts(8))]
    _, free = generate(engine, requests)
    texts = [TOKENIZER.decode(tokens_of(segments)[9:12]) for segments in free]
    ends = [first_end(tokens_of(s), text) for s, text in zip(free, texts, strict=True)]
    assert 12 in ends and max(ends) == 12
    reasons, stopped = generate(
        engine, [stopping(one, text) for one, text in zip(requests, texts, strict=True)]
    )
    assert reasons == ["stop"] * 8
    for before, after, end in zip(free, stopped, ends, strict=True):
        (segment,), (whole,) = after, before
        assert segment.token_ids.tolist() == whole.token_ids[:end].tolist()
        assert segment.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-4)


def test_a_text_that_an_update_cuts_ends_the_completion(make_engine):
    control, new = Control(), tiny_model(seed=1)
    engine = make_engine(control.watch(tiny_model()))

    async def across(one):
        control.reached.clear()
        control.arm(engine, pause_at=5)
        tasks, segments = await launch(engine, [one])
        await control.wait()
        version = engine.version + 1
        weights = tiny_model().state_dict() if version % 2 == 0 else new.state_dict()
        await asyncio.to_thread(engine.update_weights, weights.items(), version)
        engine.resume()
        return await tasks[0], segments[0]

    one = request([4, 5, 6], 12, seed=3)
    _, free = run(across(one))
    assert [len(s) for s in free] == [5, 7]
    text = TOKENIZER.decode(tokens_of(free)[4:6])
    engine.update_weights(tiny_model().state_dict().items(), 2)
    reason, stopped = run(across(stopping(one, text)))
    assert reason == "stop" and [len(s) for s in stopped] == [5, 1]
    assert tokens_of(stopped) == tokens_of(free)[:6]


def test_a_request_goes_on_with_the_text_that_its_completion_has(make_engine):
    engine = make_engine()
    whole = request([4, 5, 6], 12, seed=3)
    _, (free,) = generate(engine, [whole])
    tokens = tokens_of(free)
    text = TOKENIZER.decode(tokens[4:6])
    rest = replace(stopping(request([4, 5, 6, *tokens[:5]], 7, seed=3), text), num_sampled=5)
    (reason,), (after,) = generate(engine, [rest])
    assert reason == "stop" and tokens_of(after) == tokens[5:6]
    other = replace(rest, num_sampled=0)  # then the text begins in the prompt
    (reason,), (after,) = generate(engine, [other])
    assert tokens_of(after)[:1] == tokens[5:6] and len(tokens_of(after)) > 1
