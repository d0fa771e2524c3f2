"""Tiny models whose layers see no more than a window, a chunk or what they choose, or have sinks.

Every row of more than eight tokens goes past their windows.
"""

from __future__ import annotations

from typing import Any

from support.odd_models import odd_model

_F, _S, _C = "full_attention", "sliding_attention", "chunked_attention"
_COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_EVERY = {"sliding_window": 5}
_MIXED = {"sliding_window": 5, "layer_types": [_S, _F]}
_CAPPED = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS |= {"moe_intermediate_size": 32}
_SHARED_KV = {
    "sliding_window": 5,
    "num_hidden_layers": 5,
    "layer_types": [_S, _F, _S, _S, _F],
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 8,
}
_CHOSEN = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 6,
    "index_n_heads": 16,
    "index_head_dim": 16,
}
WINDOWED: dict[str, dict[str, Any]] = {
    "afmoe": _MIXED | _EXPERTS | {"num_dense_layers": 1},
    "cohere2": _MIXED,
    "deepseek_v32": _CHOSEN | _EXPERTS,
    "dots1": _MIXED
    | _EXPERTS
    | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "exaone4": _MIXED,
    "exaone_moe": _MIXED | _EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gemma2": _MIXED | _CAPPED,
    "gemma3_text": _MIXED,
    "gemma3n_text": _SHARED_KV
    | {
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 5,
        "intermediate_size": [48] * 5,
    },
    "gemma4_text": _SHARED_KV | {"global_head_dim": 16},
    "glm_moe_dsa": _CHOSEN | _EXPERTS,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 5,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_oss": _MIXED | _EXPERTS,
    "granite_swa": _MIXED,
    "laguna": _MIXED | _EXPERTS,
    "llama4_text": _EXPERTS
    | {
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 5,
        "layer_types": [_C, _F],
        "no_rope_layers": [1, 0],
        "floor_scale": 128,
    },
    "mimo_v2_flash": _MIXED | _EXPERTS | {"n_routed_experts": 4},
    "ministral": _MIXED,
    "mistral": _EVERY,
    "mixtral": _EVERY | _EXPERTS,
    "modernbert-decoder": {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 1},
    "olmo3": _MIXED,
    "phi3": _EVERY,
    "phimoe": _EVERY | _EXPERTS,
    "qwen2": _MIXED | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": _EVERY | _EXPERTS | {"use_sliding_window": True},
    "starcoder2": _EVERY,
    "vaultgemma": _MIXED | _CAPPED,
}
_UNNAMED = ("gpt_neo", "modernbert-decoder")  # they have no such sizes of heads


def windowed_model(kind: str, **settings: Any) -> Any:
    """A model of type ``kind`` under eager attention, which leaves nothing out."""
    from transformers import AutoConfig

    usual = dict(_COMMON)
    if kind in _UNNAMED:
        del usual["num_key_value_heads"], usual["head_dim"]
    config = AutoConfig.for_model(kind, **usual | WINDOWED[kind] | settings)
    model = odd_model(kind, config=config)
    model.set_attn_implementation("eager")
    return model
