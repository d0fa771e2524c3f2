"""Denominators of the sum over tokens. Pure functions; B sequences (rows), T tokens.

Everything counts ``loss_mask`` before any rejection, so that rejecting a token scales no other. A
row without any token counts for nothing.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig


def loss_denominator(
    loss_mask: Tensor, config: LossConfig, sample_ids: Tensor | None = None
) -> Tensor:
    r"""This piece's share of the denominator N of an optimizer step.

    .. math:: N = \sum_i |o_i| \;\text{(token)}, \quad \#\{i : |o_i| > 0\} \;\text{(sequence)},
        \quad \#\{i : |o_i| > 0\} \cdot L \;\text{(constant)}

    Shares add up over micro-batches and ranks. Sources: DAPO, https://arxiv.org/abs/2503.14476
    (token); GRPO, https://arxiv.org/abs/2402.03300 (sequence); Dr. GRPO,
    https://arxiv.org/abs/2503.20783 (constant, L = ``aggregation_length``).

    Args:
        loss_mask: [B, T] bool, before any rejection.
        config: aggregation and its length.
        sample_ids: [B], equal among rows that together are one sequence; None: each row is one.

    Returns:
        [] int64.
    """
    if config.aggregation == "token":
        return loss_mask.sum()
    sequences = loss_mask.any(-1).sum()
    if sample_ids is not None:
        sequences = torch.as_tensor(sample_ids[loss_mask.any(-1)].unique().numel())
    if config.aggregation == "sequence":
        return sequences
    if config.aggregation == "constant":
        return sequences * (config.aggregation_length or 1)
    assert_never(config.aggregation)


def token_shares(
    loss_mask: Tensor,
    config: LossConfig,
    dtype: torch.dtype = torch.float32,
    sequence_tokens: Tensor | None = None,
) -> Tensor:
    """Factor of a row's tokens in the numerator: 1, or 1/|o_i| for means of sequences. [B, 1].

    ``sequence_tokens`` [B] are |o_i| where a sequence has several rows; None: those of the row.
    """
    tokens = loss_mask.sum(-1, keepdim=True)
    if sequence_tokens is not None:
        tokens = sequence_tokens[:, None]
    if config.aggregation == "sequence":
        return tokens.clamp(min=1).to(dtype).reciprocal()
    return torch.ones_like(tokens, dtype=dtype)


def sequence_sum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over the tokens of each row, read only where the mask is True. [B, 1]."""
    return torch.where(loss_mask, values, 0.0).sum(-1, keepdim=True)


def sequence_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean over the tokens of each row, 0 for a row without any. [B, 1]."""
    return sequence_sum(values, loss_mask) / loss_mask.sum(-1, keepdim=True).clamp(min=1)
