"""Attention over rows of unlike length, and its masks: this engine's own kind for transformers.

All keys and values are kept, and a layer sees those that the model's own forward lets it see: each
of its masks comes from the model's rule (causal, a window, chunks) of each row's own positions.

B rows of one forward, W new tokens of each (left-padded), L the KV length in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from sdp_lightning.engines.attention_masks import MaskRule, extend_masks
from sdp_lightning.errors import EngineError

ATTENTION_NAME = "sdp_slots"


def rows_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int,
    mask_function: MaskRule,
    **options: Any,
) -> Tensor | None:
    """``[B, 1, W, L]``, True where a token sees another; None if rows have one offset in common.

    Args:
        batch_size: B.
        q_length: W.
        kv_length: L.
        q_offset: ``[B, 1, 1, 1]`` position of each row's first new token, negative by its padding.
        mask_function: the rule of a kind of layer.
        **options: unused.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() != 4:
        return None
    device = q_offset.device
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    positions = (torch.arange(q_length, device=device)[:, None] + q_offset).clamp(min=0)
    seen = torch.arange(kv_length, device=device)[None, None, None]
    visible = mask_function(rows, torch.zeros_like(rows[:1]), positions, seen)
    return visible.expand(batch_size, -1, q_length, kv_length)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that does not repeat KV heads: it stacks the queries of one KV head.

    Args:
        module: unused; part of transformers' interface.
        query: ``[B, heads, W, D]``.
        key: ``[B, kv_heads, L, D]``; heads is a multiple of kv_heads.
        value: ``[B, kv_heads, L, D']``.
        attention_mask: ``[B, 1, W, L]``, True at positions that are attended to.
        **kwargs: used are ``scaling``; ``softcap``, which bounds scores; ``s_aux``, ``[heads]``
            scores of sinks, which take probability and add nothing; ``indices``, ``[B, W, K]``
            positions beside which nothing is attended to.

    Returns:
        ``[B, W, heads, D']``, and None in place of attention weights.

    Raises:
        EngineError: if the model needs an attention feature that this function lacks.
    """
    for name in ("position_bias", "block_indices"):
        if kwargs.get(name) is not None:
            raise EngineError(f"the model's attention needs {name}, which this engine lacks.")
    if (indices := kwargs.get("indices")) is not None:
        chosen = torch.zeros_like(attention_mask[:, 0]).scatter(2, indices.long(), True)
        attention_mask = attention_mask & chosen[:, None]
    batch, heads, width, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    stacked = query.reshape(batch, kv_heads, groups * width, query.shape[3])
    mask = (
        attention_mask.expand(-1, -1, groups, -1)
        if width == 1
        else attention_mask.repeat(1, 1, groups, 1)
    )
    scale, cap, sinks = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
    if cap is None and sinks is None:
        output = functional.scaled_dot_product_attention(
            stacked, key, value, attn_mask=mask, scale=scale
        )
    else:
        if sinks is not None:
            sinks = sinks.view(kv_heads, groups, 1).expand(-1, -1, width).reshape(kv_heads, -1, 1)
        output = _attention(stacked, key, value, mask, scale=scale, cap=cap, sinks=sinks)
    return output.reshape(batch, heads, width, -1).transpose(1, 2).contiguous(), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What no fused kernel does: scores are capped, and sinks ``[kv_heads, queries, 1]`` join."""
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(len(scores), -1, -1, 1)], dim=3)
    shares = scores.softmax(3, dtype=torch.float32)[..., : key.shape[2]]
    return shares.to(value.dtype) @ value


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, rows_mask)
extend_masks(rows_mask)  # for models that keep their own attention
