"""Tiny vision-language models, each with its vision tower, and for the tiny tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_VOCABULARY = 50
_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}


def _rotary(*sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


_DEEP = _QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "text_config": _TEXT | {"model_type": "cohere"},
        "vision_config": _TOWER | {"model_type": "siglip_vision_model"},
    },
    "gemma3": {
        "text_config": _TEXT | _SLIDING | {"sliding_window": 512},
        "vision_config": _TOWER,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": _TEXT
        | _SLIDING
        | {
            "sliding_window": 512,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": _VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
        },
        "vision_config": _TOWER | {"num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None,
    },
    "glm4v": {"text_config": _TEXT | _rotary(1, 1, 2), "vision_config": _QWEN_TOWER},
    "idefics3": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _TOWER,
        "scale_factor": 1,
    },
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _TOWER | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llama4": {
        "text_config": _TEXT
        | {
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
        },
        "vision_config": _TOWER
        | {
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": _TOWER | {"model_type": "pixtral"},
    },
    "mllama": {
        "text_config": _TEXT | {"cross_attention_layers": [1], "num_hidden_layers": 3},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _rotary(1, 1, 2),
        "vision_config": _QWEN_TOWER | {"fullatt_block_indexes": [0]},
    },
    "qwen2_audio": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "audio_config": {
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
        },
    },
    "qwen2_vl": {
        "text_config": _TEXT | _rotary(1, 1, 2),
        "vision_config": {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
    },
    "qwen3_5": {
        "text_config": _TEXT | _LINEAR,
        "vision_config": _QWEN_TOWER | {"num_position_embeddings": 16},
    },
    "qwen3_vl": {"text_config": _TEXT | _rotary(2, 1, 1), "vision_config": _DEEP},
    "qwen3_vl_moe": {
        "text_config": _TEXT
        | _rotary(2, 1, 1)
        | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
        "vision_config": _DEEP,
    },
}


def vision_model(kind: str) -> Any:
    """A model of type ``kind`` in eval mode, of the class that has all of its parts."""
    from transformers import AutoConfig, AutoModelForMultimodalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SETTINGS[kind])
        model: Any = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "A_log" not in name:
                size = 0.4 if "embed" in name else weight.shape[-1] ** -0.5
                nn.init.normal_(weight, std=size)
            elif "gate" in name or "class_embedding" in name:
                nn.init.normal_(weight)
    return model.eval()
