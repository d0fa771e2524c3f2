"""Settings of tiny models of types that no common settings build: hybrids, mixtures, wrappers."""

from __future__ import annotations

from typing import Any

LEFT_OUT = "left out"
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_BASE: dict[str, Any] = {
    "vocab_size": 50,
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
_HEADS = _BASE | {"head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_DELTA = {  # gated delta rule
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL],
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_ENCODER_DECODER = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_WINDOWED = _HEADS | {"sliding_window": 8, "num_hidden_layers": 4}
_SHARED_KV = _HEADS | {
    "num_hidden_layers": 6,
    "sliding_window": 8,
    "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 8,
}
_GEMMA3N = _SHARED_KV | {
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 6,
    "intermediate_size": [48] * 6,
}
_QWEN_MOE = _HEADS | _DELTA | _EXPERTS
MORE: dict[str, dict[str, Any]] = {
    "bamba": _BASE | _MAMBA2 | {"attn_layer_indices": [1]},
    "blenderbot": _ENCODER_DECODER,
    "cohere_compass_text": _HEADS
    | {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": [_SLIDING, _FULL] * 2},
    "cpmant": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "dim_head": 8,
        "dim_ff": 48,
        "num_hidden_layers": 2,
        "prompt_length": 4,
        "prompt_types": 4,
    },
    "dbrx": {
        "vocab_size": 50,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "deepseek_v2": _BASE | _LATENT | _ROUTED | {"q_lora_rank": None, "topk_method": "greedy"},
    "dots1": _HEADS | _ROUTED | {"sliding_window": 8, "layer_types": [_FULL, _SLIDING]},
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _SHARED_KV | {"global_head_dim": 16},
    "granitemoehybrid": _BASE
    | _MAMBA2
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "mamba", "mamba", "attention"],
    },
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS | {"num_experts": 4, "moe_topk": 2},
    "jamba": _BASE
    | {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": _BASE
    | _LATENT
    | {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_experts_per_tok": 2,
        "q_lora_rank": None,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL],
    },
    "lfm2": _BASE | {"num_hidden_layers": 4, "layer_types": ["conv", "conv", _FULL, "conv"]},
    "minimax": _HEADS
    | {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": [_LINEAR, _FULL, _LINEAR, _FULL],
        "block_size": 16,
    },
    "olmo_hybrid": _BASE | _DELTA | {"linear_num_key_heads": 4},
    "lfm2_moe": _BASE
    | _EXPERTS
    | {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", _FULL, "conv"],
        "num_dense_layers": 1,
    },
    "longcat_flash": _BASE
    | _LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_hidden_layers": LEFT_OUT,
        "head_dim": 8,
    },
    "mamba2": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "ministral": _WINDOWED | {"layer_types": [_FULL, _SLIDING, _SLIDING, _SLIDING]},
    "nemotron": _HEADS,
    "nemotron_h": _HEADS
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "plbart": _ENCODER_DECODER,
    "qwen3_5_text": _HEADS | _DELTA,
    "qwen3_5_moe_text": _QWEN_MOE,
    "qwen3_next": _QWEN_MOE,
    "qwen4_exp_text": _QWEN_MOE
    | {
        "layer_types": [_LINEAR, _LINEAR, _LINEAR, "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "is_decoder": True,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "roc_bert": _BASE
    | {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
    },
    "whisper": _ENCODER_DECODER
    | {
        "max_target_positions": 128,
        "decoder_start_token_id": 2,
        "begin_suppress_tokens": [3],
        "num_mel_bins": 8,
        "max_source_positions": 16,
    },
    "xlm": {
        "vocab_size": 50,
        "emb_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "xmod": _BASE | {"default_language": "en_XX"},
    "zamba": _BASE
    | {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
    },
    "zamba2": _BASE
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
        "adapter_rank": 4,
    },
    "zaya": _HEADS | {"moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16},
}
