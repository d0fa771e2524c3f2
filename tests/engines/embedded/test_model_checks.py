from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.embedded.kv_cache import cache_argument
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.testing import tiny_model
from support.embedded_engines import MakeEngine, engine_maker, full_logprobs, generate, request

LONGROPE = {
    "pad_token_id": 0,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 1.5],
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    with engine_maker() as make:
        yield make


def small_config(config: type, **options):
    return config(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # else positions hardly matter
        **options,
    )


def test_a_sliding_window_is_decoded_exactly_beyond_it(make_engine):
    model = MistralForCausalLM(small_config(MistralConfig, sliding_window=16))
    _, ((segment,),) = generate(make_engine(model), [request([5, 6], 30)])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("length", [16, 64])
def test_longrope_is_decoded_up_to_where_it_changes(make_engine, length: int):
    model = Phi3ForCausalLM(small_config(Phi3Config, **LONGROPE))
    if length > 16:
        with pytest.raises(EngineError, match=r"longrope.*up to max_length=16.*engine='vllm://"):
            make_engine(model, max_length=length)
        return
    engine = make_engine(model, max_length=length)
    _, ((segment,),) = generate(engine, [request([5, 6], 14)])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_more_tokens_than_the_model_has_positions_are_refused(make_engine):
    with pytest.raises(EngineError, match="max_length=513 exceeds the 512"):
        make_engine(max_length=513)


def test_a_model_that_slots_decode_wrongly_is_refused(make_engine):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, args, out: out * out.shape[1])
    with pytest.raises(EngineError, match=r"neither in batches .*log-probs differ.*nor row by row"):
        make_engine(model)


def test_a_model_that_gives_all_logits_is_decoded(make_engine):
    """Qwen2-Audio does, whatever ``logits_to_keep`` says."""
    model = tiny_model()

    def keep_all(module, args, kwargs):
        return args, kwargs | {"logits_to_keep": 0}

    model.register_forward_pre_hook(keep_all, with_kwargs=True)
    _, ((segment,),) = generate(make_engine(model), [request([5, 6], 20)])
    expected = full_logprobs(tiny_model(), [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "hidden"])
def test_a_model_takes_its_cache_by_the_name_of_its_own_forward(make_engine, name: str, caplog):
    """Code of a model's own keeps the name of the transformers that it was written with."""
    model = tiny_model()
    own, release = model.forward, cache_argument(model)

    def with_cache(*, cache=None, **options):
        return own(**options, **{release: cache})

    def with_past(*, past_key_values=None, **options):
        return own(**options, **{release: past_key_values})

    def hidden(**options):
        return own(**options)

    forwards = {"cache": with_cache, "past_key_values": with_past, "hidden": hidden}
    model.forward = forwards[name]
    assert cache_argument(model) == (release if name == "hidden" else name)
    _, ((segment,),) = generate(make_engine(model), [request([5, 6], 8)])
    assert "row by row" not in caplog.text
    expected = full_logprobs(tiny_model(), [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_a_model_that_cannot_run_by_slots_is_refused(make_engine):
    model = tiny_model()

    def refuse(module, args, kwargs) -> None:
        if kwargs.get(cache_argument(module)) is not None:
            raise TypeError("no cache, please")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(
        EngineError, match=r"llama cannot be decoded in batches.*no cache, please.*engine='vllm://"
    ):
        make_engine(model)


def test_bfloat16_logprobs_are_close_to_float32(make_engine):
    model = tiny_model()
    _, ((segment,),) = generate(make_engine(model, dtype=torch.bfloat16), [request([5, 6], 20)])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    assert np.abs(segment.logprobs - expected).mean() < 0.1


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="max_slots must be an integer of at least 1, got 0"):
        EmbeddedEngine("some/model", max_slots=0)
