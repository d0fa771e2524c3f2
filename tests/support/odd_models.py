"""Tiny models of types that do something of their own with logits, dropout, windows or positions.

Weights are large enough that whatever is left out moves log-probs by far more than rounding does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdp_lightning.testing import tiny_tokenizer

VOCABULARY = 50
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_LEFT_OUT = "left out"
_GATED: dict[str, Any] = _COMMON | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _COMMON | {"intermediate_size": 48},
    "bloom": _COMMON | {"n_layer": 2, "n_head": 4},
    "doge": _GATED,
    "falcon": _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_h1": _GATED | _MAMBA,
    "granite_swa": _GATED | {"sliding_window": 8},
    "gpt_neo": _COMMON
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "inkling_text": _GATED
    | {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 4,
        "rel_extent": 64,
    },
    "llama4_text": _GATED
    | _EXPERTS
    | {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "attention_chunk_size": 8},
    "modernbert-decoder": _COMMON
    | {"intermediate_size": 48, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 1},
    "opt": _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi3": _GATED | {"head_dim": _LEFT_OUT},
    "phimoe": _GATED | _EXPERTS | {"head_dim": _LEFT_OUT},
    "recurrent_gemma": _GATED
    | {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    "starcoder2": _GATED | {"head_dim": _LEFT_OUT, "sliding_window": None},
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "zamba2": _GATED
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "adapter_rank": 4,
    },
    "xlstm": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2},
}


def odd_model(kind: str, *, config: Any = None, **settings: Any) -> Any:
    """A model of type ``kind`` in eval mode, of ``config`` or of its own configuration here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config is None:
        usual = {k: v for k, v in SETTINGS.get(kind, _GATED).items() if v != _LEFT_OUT}
        config = AutoConfig.for_model(kind, **usual | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "rg_lru" not in name and "A_log" not in name:
                size = 0.4 if "embed" in name else weight.shape[-1] ** -0.5
                nn.init.normal_(weight, std=size)
    return model.eval()


def saved(model: Any, folder: Path) -> str:
    """``folder`` with the model and the tiny tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
