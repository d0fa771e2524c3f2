"""What is read from models' configurations: positions, windows, layers that keep a state."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from sdp_lightning.config.model_limits import attention_spans, max_positions, stateful_layers


def test_positions_are_found_whatever_their_name() -> None:
    assert max_positions(AutoConfig.for_model("gpt2", n_positions=64)) == 64
    assert max_positions(AutoConfig.for_model("mpt", max_seq_len=32)) == 32
    assert max_positions(AutoConfig.for_model("bloom")) is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 77}),
        ("gpt_neo", {"window_size": 77}),
        ("llama4_text", {"attention_chunk_size": 77}),
        ("llama4_text", {"floor_scale": 77}),
        ("deepseek_v32", {"index_topk": 77}),
        ("deepseek_v4", {"compress_rates": {"compressed_sparse_attention": 77}}),
    ],
)
def test_lengths_beyond_which_a_layer_computes_otherwise_are_found(
    kind: str, settings: dict[str, Any]
) -> None:
    spans = attention_spans(AutoConfig.for_model(kind, **settings))
    assert 77 in spans and spans == sorted(set(spans)) and spans[0] > 1


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("llama", []),
        ("gemma3_text", []),
        ("llama4_text", []),
        ("deepseek_v32", []),
        ("qwen3_next", ["linear_attention"]),
        ("falcon_h1", ["hybrid"]),
    ],
)
def test_layers_that_keep_a_state_are_told_from_attention(kind: str, found: list[str]) -> None:
    assert stateful_layers(AutoConfig.for_model(kind)) == found
