"""Tiny models where an adapter is not as on a Llama: experts, states, shared and odd layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from support.odd_models import VOCABULARY, odd_model

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "chunk_size": 16}
LORA_MODELS: dict[str, dict[str, Any]] = {
    "afmoe": _COMMON  # its router is a linear layer
    | {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "deepseek_v3": _COMMON | _EXPERTS | _LATENT,
    "dots1": _COMMON | _EXPERTS | {"head_dim": 8},
    "ernie4_5_moe": _COMMON
    | {
        "moe_intermediate_size": 24,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "glm4_moe": _COMMON | _EXPERTS | {"head_dim": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gpt_oss": _COMMON | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": _COMMON
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "qwen3_moe": _COMMON
    | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": _COMMON
    | {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "zamba2": _COMMON
    | _MAMBA
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
        "adapter_rank": 4,
    },
}


def lora_model(kind: str) -> Any:
    """A model of type ``kind`` in eval mode."""
    if kind in LORA_MODELS:
        return odd_model(kind, config=AutoConfig.for_model(kind, **LORA_MODELS[kind]))
    return odd_model(kind)


def copy_of(model: Any) -> Any:
    """A model of its own, with other weights, as an engine has one."""
    return AutoModelForCausalLM.from_config(model.config).eval()
