import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import InferenceEngine
from sdp_lightning.testing import tiny_model
from support.embedded_engines import (
    VOCABULARY,
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


def test_it_is_an_inference_engine():
    engine: InferenceEngine = EmbeddedEngine("some/model")
    assert engine.updates_in_flight


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_those_of_a_full_forward(make_engine, temperature: float, tied: bool):
    model = tiny_model(tie_word_embeddings=tied)
    engine = make_engine(model)
    requests = [request(p, 20, seed=i, temperature=temperature) for i, p in enumerate(prompts(9))]
    reasons, segments = generate(engine, requests)
    assert set(reasons) == {"length"}
    for one, (segment,) in zip(requests, segments, strict=True):
        assert (segment.version, segment.temperature, len(segment)) == (0, temperature, 20)
        assert segment.kv_on_update == "recompute"
        expected = full_logprobs(model, one.token_ids, segment.token_ids, temperature)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)
    assert engine.num_generated == 9 * 20


def test_the_batch_does_not_change_a_requests_tokens(make_engine):
    requests = [request(p, 12, seed=i) for i, p in enumerate(prompts(20))]
    _, together = generate(make_engine(), requests)
    engine = make_engine(max_slots=3)
    _, squeezed = generate(engine, requests)
    alone = [generate(make_engine(), [one])[1][0] for one in requests[:3]]
    assert [tokens_of(s) for s in together] == [tokens_of(s) for s in squeezed]
    assert [tokens_of(s) for s in together[:3]] == [tokens_of(s) for s in alone]
    assert len({tuple(tokens_of(s)) for s in together}) == 20


def test_more_requests_than_slots_all_finish_and_short_ones_leave_early(make_engine):
    finished: list[int] = []
    budgets = [40, 2, 17, 3, 5, 30, 1, 8, 8, 2]

    async def scenario():
        requests = [request(p, b) for p, b in zip(prompts(10), budgets, strict=True)]
        tasks, segments = await launch(engine, requests)
        for index, task in enumerate(tasks):
            task.add_done_callback(lambda _, index=index: finished.append(index))
        await asyncio.gather(*tasks)
        return segments

    engine = make_engine(max_slots=4)
    segments = run(scenario())
    assert [len(tokens_of(s)) for s in segments] == budgets
    assert finished.index(1) < finished.index(4) < finished.index(0)
    assert engine.num_active == 0


def test_tokens_do_not_depend_on_rows_moving_or_growing(make_engine):
    model = tiny_model()
    engine = make_engine(model, max_slots=5)
    rng = np.random.default_rng(3)
    requests = [
        request(p, int(rng.integers(1, 120)), seed=i) for i, p in enumerate(prompts(25, seed=4))
    ]
    _, segments = generate(engine, requests)
    for one, (segment,) in zip(requests, segments, strict=True):
        expected = full_logprobs(model, one.token_ids, segment.token_ids)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_a_prompt_longer_than_a_prefill_is_computed_in_parts(make_engine, monkeypatch):
    monkeypatch.setattr("sdp_lightning.engines.embedded.scheduler.MAX_PREFILL_TOKENS", 8)
    model = tiny_model()
    engine = make_engine(model)
    rng = np.random.default_rng(5)
    long = rng.integers(3, VOCABULARY, size=30)
    requests = [request(p, 6, seed=i) for i, p in enumerate([[5], long, long, [5, 9], long[:20]])]
    _, segments = generate(engine, requests)
    for one, (segment,) in zip(requests, segments, strict=True):
        expected = full_logprobs(model, one.token_ids, segment.token_ids)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)
    assert engine.num_prefill_tokens <= 30 + 2 + 3


def test_a_group_computes_its_prompt_once(make_engine):
    model, prompt = tiny_model(), np.arange(10, 30)
    engine = make_engine(model)
    requests = [request(prompt, 5, seed=seed) for seed in range(8)]
    _, segments = generate(engine, requests)
    assert engine.num_prefill_tokens == 20
    assert len({tuple(tokens_of(s)) for s in segments}) > 1
    for (segment,) in segments:
        expected = full_logprobs(model, prompt, segment.token_ids)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)
    _, ((late,),) = generate(engine, [request(prompt, 5, seed=3)])
    assert engine.num_prefill_tokens == 21, "a finished slot still holds all but the last token"
    assert late.token_ids.tolist() == tokens_of(segments[3])


def test_different_prompts_share_their_common_beginning(make_engine):
    model = tiny_model()
    engine = make_engine(model)
    shots = np.arange(10, 30)
    requests = [request(np.append(shots, [3 + i, 40]), 4, seed=i) for i in range(5)]
    _, segments = generate(engine, requests)
    assert engine.num_prefill_tokens == 22 + 4 * 2
    for one, (segment,) in zip(requests, segments, strict=True):
        expected = full_logprobs(model, one.token_ids, segment.token_ids)
        np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("kv_on_update", ["recompute", "keep"])
def test_an_update_forgets_every_prefix(make_engine, kv_on_update: str):
    old, new, prompt = tiny_model(), tiny_model(seed=1), np.arange(10, 30)
    engine = make_engine(old, kv_on_update=kv_on_update)
    generate(engine, [request(prompt)])
    engine.update_weights(new.state_dict().items(), 1)
    _, ((segment,),) = generate(engine, [request(prompt, seed=1)])
    assert engine.num_prefill_tokens == 40
    expected = full_logprobs(new, prompt, segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)
