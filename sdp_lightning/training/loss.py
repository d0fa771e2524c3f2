"""The loss of a micro-batch: which log-probs are x and q, and the KL to a reference.

Shapes: B trajectories, T tokens; log-probs in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import (
    PolicyLoss,
    batch_normalized,
    complete_segment_logprobs,
    decoupled_sums,
    group_relative_advantages,
    leave_one_out_advantages,
    loglinear_proximal,
    loglinear_segment,
    second_moment_bound,
    second_moment_set,
    within_second_moment,
)
from sdp_lightning.objective.aggregation import token_shares
from sdp_lightning.objective.kl import kl_estimate, kl_penalised_rewards
from sdp_lightning.objective.loss import loss_of_rows
from sdp_lightning.training.batch import Batch, one_row_a_sample


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """A loss and the log-probs that it was computed from.

    Args:
        loss: [] to be minimized: the policy loss, and the KL term if there is one.
        policy: the policy loss with its per-token results.
        proximal: [B, T] x.
        segment: [B, T] q.
        kl: [B, T] estimate of the KL to the reference, of rejected tokens too; 0 without one;
            detached.
    """

    loss: Tensor
    policy: PolicyLoss
    proximal: Tensor
    segment: Tensor
    kl: Tensor


def batch_loss(
    target: Tensor,
    batch: Batch,
    *,
    config: LossConfig,
    denominator: float,
    share_done: float = 0.0,
) -> BatchLoss:
    """The share of one micro-batch in the loss of an optimizer step.

    Args:
        target: [B, T] n. Carries the gradient.
        batch: the micro-batch, with advantages and what else the update has prepared.
        config: the objective.
        denominator: sum of :func:`~sdp_lightning.objective.loss_denominator` over the whole step.
        share_done: share of the batch's optimizer steps already made, in [0, 1).
    """
    assert batch.advantages is not None
    proximal = _proximal(target, batch, config, share_done)
    segment = segment_policy(proximal, batch, config)
    policy = loss_of_rows(
        (target, proximal, segment, batch.behavior_logprobs, batch.advantages),
        batch.loss_mask if batch.rejected is None else batch.loss_mask & ~batch.rejected,
        config=config,
        num_tokens=denominator,
        lags=batch.lags,
        sequence_tokens=batch.sample_tokens,
    )
    loss, kl = policy.loss, torch.zeros_like(proximal)
    if batch.reference_logprobs is not None:
        kl = _kl(target.detach(), batch, batch.loss_mask, config)
        if config.kl_in == "loss":
            mask = policy.kept if config.kl_tokens == "kept" else batch.loss_mask
            shares = token_shares(batch.loss_mask, config, kl.dtype, batch.sample_tokens)
            total = (_kl(target, batch, mask, config) * shares).sum()
            loss = loss + config.kl_coefficient * total / max(denominator, 1.0)
    return BatchLoss(loss, policy, proximal, segment, kl)


def _kl(target: Tensor, batch: Batch, mask: Tensor, config: LossConfig) -> Tensor:
    """[B, T] estimates of the KL to the reference, 0 outside ``mask``."""
    assert batch.reference_logprobs is not None
    behavior = batch.behavior_logprobs
    return kl_estimate(
        target, batch.reference_logprobs, mask, config.kl_estimator, behavior=behavior
    )


def reject_by_second_moment(batch: Batch, cap: float, sums: RankSums) -> Batch:
    """Reject the tokens that would take the second moment of the drift above ``cap`` (M2PO).

    Args:
        batch: one minibatch, with proximal log-probs and advantages.
        cap: largest mean of (x - b)^2 over the bounded tokens of all ranks.
        sums: sums over ranks; a collective.
    """
    assert batch.proximal_logprobs is not None and batch.advantages is not None
    drift = batch.proximal_logprobs - batch.behavior_logprobs
    bounded = second_moment_set(drift, batch.advantages, batch.loss_mask)
    bound = second_moment_bound(sums.concatenate(drift[bounded]), cap)
    kept = within_second_moment(drift, batch.advantages, batch.loss_mask, bound)
    return replace(batch, rejected=batch.loss_mask & ~kept)


def _proximal(target: Tensor, batch: Batch, config: LossConfig, share_done: float) -> Tensor:
    """[B, T] x: recomputed, log-linear, or this pass's own, if it is the step's only one."""
    if batch.proximal_logprobs is not None:
        return batch.proximal_logprobs
    if config.proximal == "loglinear":
        return loglinear_proximal(target, batch.behavior_logprobs, batch.lags, share_done)
    return target.detach()


def segment_policy(proximal: Tensor, batch: Batch, config: LossConfig) -> Tensor:
    """[B, T] q: scored and completed, or log-linear."""
    if config.segment_proximal == "loglinear":
        return loglinear_segment(proximal, batch.behavior_logprobs, batch.lags)
    return complete_segment_logprobs(
        batch.segment_logprobs,
        batch.segment_scored,
        proximal,
        batch.behavior_logprobs,
        batch.lags,
        batch.missing_proximal,
    )


def batch_advantages(
    batch: Batch, loss: LossConfig, update: UpdateConfig, sums: RankSums
) -> Tensor:
    """[B, T], 0 for tokens beyond the largest lag that is trained. A collective.

    Args:
        batch: whole groups; with reference log-probs where ``loss`` needs them.
        loss: says whether the KL to the reference is subtracted from the reward.
        update: names the estimator of advantages.
        sums: sums over ranks.

    Raises:
        ConfigError: if the estimator needs named rewards and there are none.
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
    whole, sample = one_row_a_sample(replace(batch, rewards=rewards))
    if update.advantages == "gdpo":
        per_row = gdpo_advantages(whole, update, sums)[sample]
    else:
        per_row = row_advantages(whole.rewards, whole.group_ids, update)[sample]
    per_token = per_row[:, None].expand(batch.loss_mask.shape)
    if batch.max_lag is not None:
        per_token = torch.where(batch.lags > batch.max_lag, 0.0, per_token)
    return per_token


def gdpo_advantages(batch: Batch, update: UpdateConfig, sums: RankSums) -> Tensor:
    """[B] advantages of samples by GDPO, over the batch of all ranks. A collective.

    Args:
        batch: whole groups of this rank, a row for each sample.
        update: names the standard deviation.
        sums: sums over ranks.

    Raises:
        ConfigError: if the rewards have no names.
    """
    if batch.named_rewards is None or batch.reward_weights is None:
        raise ConfigError(
            "advantages='gdpo' normalizes each of several rewards, and these trajectories have one "
            "without a name. Give the workflow rewards={...}, or use advantages='group'."
        )
    std = update.group_std
    own = decoupled_sums(batch.named_rewards, batch.reward_weights, batch.group_ids, std=std)
    counted = own[:0] if batch.is_blank else own
    table = sums.table(len(counted), counted.sum().item(), counted.square().sum().item())
    count, total, squares = map(sum, zip(*table, strict=True))
    return batch_normalized(own, count=count, total=total, squares=squares, std=std)


def row_advantages(rewards: Tensor, group_ids: Tensor, update: UpdateConfig) -> Tensor:
    """[B] advantages of trajectories by the estimator that ``update`` names.

    Args:
        rewards: [B].
        group_ids: [B] integers, equal among siblings.
        update: names the estimator.
    """
    if update.advantages == "rloo":
        return leave_one_out_advantages(rewards, group_ids)
    return group_relative_advantages(
        rewards, group_ids, scale_by_std=update.scales_by_std, std=update.group_std
    )
