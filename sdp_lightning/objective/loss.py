"""The policy loss: decoupled PPO, corrected segment by segment.

One pure function. Shapes: B trajectories, T tokens, arrays aligned on the token they score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective.aggregation import loss_denominator, token_shares
from sdp_lightning.objective.precision import at_least_float32
from sdp_lightning.objective.rejection import correct
from sdp_lightning.objective.surrogates import of_sequences, surrogate
from sdp_lightning.objective.trust_region import centre_and_log_weight


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """A loss and its per-token masks, weights and ratios. All but ``loss`` are detached.

    Args:
        loss: [] to be minimized.
        kept: [B, T] bool, tokens that passed mask, cap, floor and behavior mask.
        clipped: [B, T] bool, kept tokens whose ratio is clipped, which leaves them no gradient; for
            CISPO, whose weight is clamped.
        log_weight: [B, T] log of the applied weight for every token of the mask, 0 elsewhere.
        log_ratio: [B, T] log of n over the centre for every token of the mask, 0 elsewhere.
    """

    loss: Tensor
    kept: Tensor
    clipped: Tensor
    log_weight: Tensor
    log_ratio: Tensor


def segment_wise_ppo_loss(
    target_logprobs: Tensor,
    proximal_logprobs: Tensor,
    segment_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    config: LossConfig,
    num_tokens: float | None = None,
    lags: Tensor | None = None,
) -> PolicyLoss:
    r"""Decoupled PPO whose off-policy correction is taken segment by segment, and its relatives.

    .. math:: L = -\frac{1}{N} \sum_{t \in K} w_t \min(r_t A_t,
        \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t), \quad
        r = e^{n - m}, \quad w = e^{m - b}

    K are the tokens of the mask whose drift exp(x - b), or weight, lies between floor and cap.
    ``config`` replaces each part: see :mod:`~sdp_lightning.objective.surrogates` for the minimum,
    ``rejection`` for K, ``trust_region`` for m and w, ``aggregation`` for N. Sources: Hilton et al.
    2021, https://arxiv.org/abs/2110.00641; AReaL, https://arxiv.org/abs/2505.24298.

    Args:
        target_logprobs: [B, T] n, under the policy being optimized. Carries the gradient.
        proximal_logprobs: [B, T] x, under the policy at the start of this training step.
        segment_logprobs: [B, T] q; read only if ``config.needs_segment_proximal``.
        behavior_logprobs: [B, T] b, of the distribution sampled from.
        advantages: [B, T].
        loss_mask: [B, T] bool, a row is a sequence. Values where it is False have no effect.
        config: the estimator.
        num_tokens: the denominator N of the whole step, before any rejection: the sum of
            ``loss_denominator`` over its pieces; default: this piece's.
        lags: [B, T] integers, versions between sampling and training; ``"past"`` requires them.

    Returns:
        The loss (0 with a valid graph if no token is kept) and the per-token masks.

    Raises:
        ValueError: if shapes differ, ``loss_mask`` is not boolean, ``num_tokens`` is negative, or
            ``trust_region="past"`` has no ``lags``.
    """
    tensors = (target_logprobs, proximal_logprobs, segment_logprobs, behavior_logprobs, advantages)
    return loss_of_rows(tensors, loss_mask, config=config, num_tokens=num_tokens, lags=lags)


def loss_of_rows(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    loss_mask: Tensor,
    *,
    config: LossConfig,
    num_tokens: float | None = None,
    lags: Tensor | None = None,
    sequence_tokens: Tensor | None = None,
) -> PolicyLoss:
    """:func:`segment_wise_ppo_loss` of rows of which several may be one sequence.

    Args:
        tensors: n, x, q, b and advantages, each [B, T].
        loss_mask: [B, T] bool.
        config: the estimator.
        num_tokens: the denominator N of the whole step.
        lags: [B, T] integers.
        sequence_tokens: [B] tokens of the whole sequence of a row; None: a row is a sequence.

    Raises:
        ValueError: as :func:`segment_wise_ppo_loss`.
    """
    _check(tensors, loss_mask, num_tokens, lags)
    target, *others = map(at_least_float32, tensors)
    *policies, advantage = (tensor.detach() for tensor in others)
    made = _policy_loss((target, *policies), advantage, loss_mask, config, lags)
    shares = token_shares(loss_mask, config, made.loss.dtype, sequence_tokens)
    return replace(made, loss=_mean(made.loss, shares, loss_mask, config, num_tokens))


def _policy_loss(
    policies: tuple[Tensor, ...],
    advantage: Tensor,
    loss_mask: Tensor,
    config: LossConfig,
    lags: Tensor | None,
) -> PolicyLoss:
    """The loss of n, x, q and b, all but n detached; ``loss`` [B, T] is not yet a mean."""
    target, proximal, segment, behavior = policies
    centre, log_weight = centre_and_log_weight(proximal, segment, behavior, config, lags)
    log_ratio = target - centre
    if config.ratio_level == "sequence":
        log_weight, log_ratio = of_sequences(log_weight, log_ratio, loss_mask)
    kept, log_weight = correct(proximal - behavior, log_weight, advantage, loss_mask, config)
    value, bounded = surrogate(target, log_weight, log_ratio, advantage, kept, config)
    return PolicyLoss(
        loss=value,
        kept=kept,
        clipped=kept & bounded,
        log_weight=torch.where(loss_mask, log_weight, 0.0),
        log_ratio=torch.where(loss_mask, log_ratio.detach(), 0.0),
    )


def _mean(
    value: Tensor,
    shares: Tensor,
    loss_mask: Tensor,
    config: LossConfig,
    num_tokens: float | None,
) -> Tensor:
    """This piece's share of the mean, negated. []."""
    count = loss_denominator(loss_mask, config) if num_tokens is None else num_tokens
    count = torch.as_tensor(count, dtype=value.dtype, device=value.device)  # not the default type
    return -(value * shares).sum() / count.clamp(min=1)


def _check(
    tensors: tuple[Tensor, ...], loss_mask: Tensor, num_tokens: float | None, lags: Tensor | None
) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be boolean, got {loss_mask.dtype}.")
    names = ("target", "proximal", "segment", "behavior", "advantages")
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, tensors, strict=True)}
    if lags is not None:
        shapes["lags"] = tuple(lags.shape)
    if any(shape != tuple(loss_mask.shape) for shape in shapes.values()):
        raise ValueError(
            f"every tensor must be {tuple(loss_mask.shape)}, as loss_mask is; got {shapes}."
        )
    if num_tokens is not None and not 0 <= num_tokens < math.inf:
        raise ValueError(f"num_tokens must be finite and 0 or more, got {num_tokens}.")
