"""The advantages of a batch: from its rewards, of which a KL may be taken off, to every token."""

from __future__ import annotations

import torch
from torch import Tensor

from sdp_lightning.batch import Batch
from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.objective import group_relative_advantages, leave_one_out_advantages
from sdp_lightning.objective.kl import kl_penalised_rewards


def batch_advantages(batch: Batch, loss: LossConfig, update: UpdateConfig) -> Tensor:
    """[B, T], 0 for tokens beyond the largest lag that is trained.

    Args:
        batch: whole groups; with reference log-probs where ``loss`` needs them.
        loss: says whether the KL to the reference is taken off the reward.
        update: says what a reward is compared with.
    """
    rewards = batch.rewards
    if batch.reference_logprobs is not None and loss.kl_in == "reward":
        rewards = kl_penalised_rewards(
            rewards,
            batch.behavior_logprobs,
            batch.reference_logprobs,
            batch.loss_mask,
            coefficient=loss.kl_coefficient,
            estimator=loss.kl_estimator,
        )
    if update.advantages == "rloo":
        per_row = leave_one_out_advantages(rewards, batch.group_ids)
    else:
        scale = update.scale_advantages_by_std is not False
        per_row = group_relative_advantages(rewards, batch.group_ids, scale_by_std=scale)
    per_token = per_row[:, None].expand(batch.loss_mask.shape)
    if batch.max_lag is not None:
        per_token = torch.where(batch.lags > batch.max_lag, 0.0, per_token)
    return per_token
