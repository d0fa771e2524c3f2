"""Samples of several trajectories: an agent's branches, which count as one where rewards do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdp_lightning.training.batch.batch import Batch, index_of_groups


def one_row_a_sample(batch: Batch) -> tuple[Batch, Tensor]:
    """The first row of each sample, with the mean rewards of its rows, and each row's sample [B].

    A batch whose rows are all samples of their own is returned as it is.
    """
    if batch.sample_ids is None:
        return batch, torch.arange(len(batch), device=batch.rewards.device)
    _, sample, first = index_of_groups(batch.sample_ids)
    count = torch.zeros(first.numel(), dtype=torch.float64, device=sample.device)
    count = count.index_add(0, sample, torch.ones_like(sample, dtype=torch.float64))

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros((first.numel(), *values.shape[1:]), dtype=torch.float64)
        total = total.index_add(0, sample, values.double())
        return (total / count.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)

    named = batch.named_rewards
    whole = replace(
        batch.select(first.tolist()),
        rewards=mean(batch.rewards),
        named_rewards=None if named is None else mean(named),
    )
    return whole, sample


def tokens_of_samples(batch: Batch) -> Tensor | None:
    """[B] int64, tokens of the loss mask in all rows of each row's sample; None: of each row."""
    if batch.sample_ids is None:
        return None
    ids, sample, _ = index_of_groups(batch.sample_ids)
    tokens = batch.loss_mask.sum(1)
    return torch.zeros_like(ids).index_add(0, sample, tokens)[sample]
