"""Models that cannot be batched are decoded row by row, exactly, through swaps and aborts."""

import asyncio
import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sdp_lightning.errors import EngineError
from sdp_lightning.types import Segment
from support.embedded_engines import (
    PATIENCE_S,
    MakeEngine,
    engine_maker,
    full_logprobs,
    generate,
    request,
    run,
    tokens_of,
)
from support.model_table import small_model

GROUP = [5, 9, 12, 7, 20, 3, 8, 30, 11]
# They need two tokens in a pass; a cache that cannot count; a cache that they are given, positions,
# and tensors that their modules keep.
FAST = ["nemotron_h", "kimi_linear", "recurrent_gemma"]
SLOW = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "rwkv",
    "zamba",
    "zamba2",
]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


@torch.no_grad()
def moved(model, amount: float = 0.05):
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight += amount * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_logprobs_are_those_of_full_forwards_through_a_swap_and_an_abort(make_engine, kind, caplog):
    old, new = small_model(kind), moved(small_model(kind))
    with caplog.at_level(logging.WARNING):
        engine = make_engine(old, max_slots=4, max_length=32)
    (said,) = [r.getMessage() for r in caplog.records if "row by row" in r.getMessage()]
    assert said.startswith(f"model type {kind} decodes row by row") and "vllm://" in said
    prompts = [[5, 6], GROUP, GROUP, GROUP, [4], GROUP]  # two wait for a slot
    requests = [
        request(p, 4 if i == 0 else 12, seed=i, temperature=0.5 + 0.5 * (i % 2))
        for i, p in enumerate(prompts)
    ]
    reached = threading.Event()

    async def scenario():
        segments: list[list[Segment]] = [[] for _ in requests]

        def first(segment: Segment) -> None:
            segments[0].append(segment)
            engine.pause()  # from the decode thread: after this step
            reached.set()

        engine.pause()
        sinks = [first, *(found.append for found in segments[1:])]
        tasks = [
            asyncio.create_task(engine.generate(one, sink))
            for one, sink in zip(requests, sinks, strict=True)
        ]
        await asyncio.sleep(0)
        engine.resume()
        assert await asyncio.to_thread(reached.wait, PATIENCE_S)
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        before = engine.num_prefill_tokens
        await asyncio.to_thread(engine.update_weights, new.state_dict().items(), 1)
        engine.resume()
        await asyncio.gather(*tasks, return_exceptions=True)
        return segments, before, engine.num_prefill_tokens - before

    segments, before, after = run(scenario())
    assert before == 2 + 9, "a group's prompt is computed once"
    resumed = zip(requests[1:], segments[1:], strict=True)
    rows = {(*one.token_ids, *tokens_of(found[:-1])) for one, found in resumed if found}
    assert after == sum(map(len, rows)), "after the swap every row is computed from its first token"
    assert engine.num_active == 0
    for index, (one, found) in enumerate(zip(requests, segments, strict=True)):
        tokens, start = tokens_of(found), 0
        assert len(tokens) == (one.params.max_new_tokens if index != 2 else 0)
        assert [s.version for s in found] == [[0], [0, 1], [], [0, 1], [1], [1]][index]
        for segment in found:
            model = new if segment.version else old
            expected = full_logprobs(model, one.token_ids, tokens, one.params.temperature)
            expected = expected[start : start + len(segment)]
            np.testing.assert_allclose(segment.logprobs, expected, atol=2e-5)
            start += len(segment)


def test_greedy_and_truncated_sampling_are_those_of_batches(make_engine, monkeypatch) -> None:
    _, batched = generate(make_engine(), REQUESTS)

    def refuse(model, length: int) -> None:
        raise EngineError("this test decodes row by row.")

    monkeypatch.setattr("sdp_lightning.engines.embedded.row_checks.check_config", refuse)
    _, by_row = generate(make_engine(max_length=64), REQUESTS)
    for one, other in zip(batched, by_row, strict=True):
        assert tokens_of(one) == tokens_of(other)
        np.testing.assert_allclose(one[0].logprobs, other[0].logprobs, atol=1e-5)


REQUESTS = [
    request(GROUP, 20, seed=1),
    request(GROUP, 20, seed=2, temperature=0.0),
    request([5, 6], 20, seed=3, top_k=5),
    request([5], 20, seed=4, top_p=0.7),
]
