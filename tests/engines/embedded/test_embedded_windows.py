"""Models whose layers see a part of a sequence, or have sinks or caps, decode exactly."""

import asyncio
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from sdp_lightning.engines.embedded.kv_cache import cache_argument
from sdp_lightning.errors import EngineError
from support.embedded_engines import (
    Control,
    MakeEngine,
    engine_maker,
    full_logprobs,
    launch,
    request,
    run,
)
from support.windowed_models import WINDOWED, windowed_model

# A window and sinks with experts, a window and a cap, experts with a window, chosen tokens.
FAST = ["gpt_oss", "gemma2", "qwen3_moe", "deepseek_v32"]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


def changed(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(1.05)
    return model


def decode_past_windows(make_engine: MakeEngine, kind: str, **settings) -> None:
    """Rows of unlike length, with prefixes in common, cut by a pause and a new version."""
    old, new, served = (windowed_model(kind, **settings) for _ in range(3))
    control, models = Control(), [old, changed(new)]
    engine = make_engine(control.watch(served), max_slots=3, max_length=64)
    text = np.random.default_rng(0).integers(3, 49, 40)
    given = [text[:22], text[:22], text[:31], text[35:38], text]  # two wait for a slot
    requests = [request(prompt, 9, seed=seed) for seed, prompt in enumerate(given)]

    async def scenario():
        control.arm(engine, pause_at=6)
        tasks, segments = await launch(engine, requests)
        await control.wait()
        await asyncio.to_thread(engine.update_weights, models[1].state_dict().items(), 1)
        engine.resume()
        await asyncio.gather(*tasks)
        return segments

    versions = set()
    for one, segments in zip(requests, run(scenario()), strict=True):
        context = one.token_ids
        for segment in segments:
            expected = full_logprobs(models[segment.version], context, segment.token_ids)
            np.testing.assert_allclose(segment.logprobs, expected, atol=2e-5)
            context = np.append(context, segment.token_ids)
            versions.add((segment.version, len(segments)))
    assert {(0, 2), (1, 2), (1, 1)} <= versions
    before = 22 + 9 + 3  # computed before the update, if prefixes are shared
    assert engine.num_prefill_tokens < before + sum(len(prompt) + 9 for prompt in given)


@pytest.mark.parametrize("kind", FAST)
def test_logprobs_past_a_window_are_those_of_a_full_forward(make_engine, kind: str):
    decode_past_windows(make_engine, kind)


def test_rows_are_decoded_one_by_one_where_a_model_takes_their_positions_to_be_the_same(
    make_engine, caplog
):
    with caplog.at_level(logging.WARNING):
        decode_past_windows(make_engine, "llama4_text", floor_scale=16)
    assert "llama4_text decodes one sequence at a time" in caplog.text


def test_a_window_that_the_engine_cannot_apply_is_found_beyond_it(make_engine):
    """A rule of the model's own, which acts in a forward without cache only."""
    model = windowed_model("mistral", sliding_window=30)

    def forget(module, args, kwargs):
        far = kwargs.get(cache_argument(module)) is None and kwargs["input_ids"].shape[1] > 30
        ids = kwargs["input_ids"].clone()
        ids[:, : 1 if far else 0] = 0
        return args, kwargs | {"input_ids": ids}

    model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(EngineError, match=r"up to 64 tokens differ.*Up to max_length=30 it decod"):
        make_engine(model, max_length=64)
    make_engine(model, max_length=30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(WINDOWED.keys() - FAST))
def test_every_windowed_model_decodes_as_a_full_forward_does(make_engine, kind: str, caplog):
    decode_past_windows(make_engine, kind)
    assert ("one sequence at a time" in caplog.text) == (kind == "gpt_neo")
