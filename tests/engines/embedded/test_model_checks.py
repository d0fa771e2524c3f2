from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.testing import tiny_model
from support.embedded_engines import MakeEngine, engine_maker, full_logprobs, generate, request


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
        **options,
    )


def test_a_sliding_window_is_refused_unless_sequences_fit_in_it(make_engine):
    model = MistralForCausalLM(small_config(MistralConfig, sliding_window=16))
    with pytest.raises(EngineError, match=r"mistral.*sliding window of 16.*max_length=16"):
        make_engine(model)
    _, ((segment,),) = generate(make_engine(model, max_length=16), [request([5, 6], 14)])
    expected = full_logprobs(model, [5, 6], segment.token_ids)
    np.testing.assert_allclose(segment.logprobs, expected, atol=1e-5)


def test_positions_that_are_not_rotary_are_refused(make_engine):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=49, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(EngineError, match="gpt2 has no rotary positions"):
        make_engine(model)


def test_more_tokens_than_the_model_has_positions_are_refused(make_engine):
    with pytest.raises(EngineError, match="max_length=513 exceeds the 512"):
        make_engine(max_length=513)


def test_a_model_that_slots_decode_wrongly_is_refused(make_engine):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, args, out: out * out.shape[1])
    with pytest.raises(EngineError, match="llama: decoded log-probs differ"):
        make_engine(model)


def test_a_model_that_cannot_run_by_slots_is_refused(make_engine):
    model = tiny_model()

    def refuse(module, args, kwargs) -> None:
        if kwargs.get("past_key_values") is not None:
            raise TypeError("no cache, please")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(
        EngineError, match=r"llama cannot be decoded by this engine.*no cache, please"
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
