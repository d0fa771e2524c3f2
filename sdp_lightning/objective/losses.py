"""The policy loss: decoupled PPO, corrected segment by segment.

One pure function. Shapes: B trajectories, T tokens, arrays aligned on the token they score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective.corrections import (
    at_least_float32,
    centre_and_log_weight,
    within_bounds,
)


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """A loss and what became of every token. All but ``loss`` are detached.

    Args:
        loss: [] to be minimised.
        kept: [B, T] bool, tokens that passed mask, cap and floor.
        clipped: [B, T] bool, kept tokens without a gradient, because their ratio is clipped.
        log_weight: [B, T] log w of every token of the mask, 0 elsewhere.
        log_ratio: [B, T] log of n over the centre, of every token of the mask, 0 elsewhere.
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
) -> PolicyLoss:
    r"""Decoupled PPO whose off-policy correction is taken segment by segment.

    .. math:: L = -\frac{1}{N} \sum_{t \in K} w_t \min(r_t A_t,
        \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t), \quad
        r = e^{n - m}, \quad w = e^{m - b}

    K are the tokens of the mask whose drift exp(x - b), or weight, lies between floor and cap.
    Sources: Hilton et al. 2021, https://arxiv.org/abs/2110.00641; AReaL,
    https://arxiv.org/abs/2505.24298; dual clip: Ye et al. 2019, https://arxiv.org/abs/1912.09729.

    Args:
        target_logprobs: [B, T] n, under the policy being optimized. Carries the gradient.
        proximal_logprobs: [B, T] x, under the policy at the start of this training step.
        segment_logprobs: [B, T] q; read only if ``config.needs_segment_proximal``.
        behavior_logprobs: [B, T] b, of the distribution sampled from.
        advantages: [B, T].
        loss_mask: [B, T] bool. Whatever stands where it is False has no effect.
        config: centre, clip, bounds.
        num_tokens: N, at least 1, before any rejection; default ``loss_mask.sum()``.

    Returns:
        The loss (0 with a valid graph if no token is kept) and the per-token masks.

    Raises:
        ValueError: if shapes differ, ``loss_mask`` is not boolean, or ``num_tokens`` is negative.
    """
    tensors = (target_logprobs, proximal_logprobs, segment_logprobs, behavior_logprobs, advantages)
    _check(tensors, loss_mask, num_tokens)
    target, *others = map(at_least_float32, tensors)
    proximal, segment, behavior, advantage = (tensor.detach() for tensor in others)

    centre, log_weight = centre_and_log_weight(proximal, segment, behavior, config)
    tested = proximal - behavior if config.rejection_on == "drift" else log_weight
    kept = loss_mask & within_bounds(tested, config)

    log_ratio = target - centre
    bound, clipped = _clip(log_ratio.detach(), advantage, config)
    log_surrogate = log_weight + torch.where(clipped, bound, log_ratio)
    acting = kept & (advantage != 0)  # before exp: what overflows elsewhere would give nan * 0
    surrogate = torch.where(acting, log_surrogate, 0.0).exp() * torch.where(acting, advantage, 0.0)
    count = loss_mask.sum() if num_tokens is None else torch.as_tensor(num_tokens)
    loss = -surrogate.sum() / count.to(surrogate).clamp(min=1)
    return PolicyLoss(
        loss=loss,
        kept=kept,
        clipped=kept & clipped,
        log_weight=torch.where(loss_mask, log_weight, 0.0),
        log_ratio=torch.where(loss_mask, log_ratio.detach(), 0.0),
    )


def _clip(log_ratio: Tensor, advantage: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Log of the bound that the pessimistic minimum puts in place of the ratio, and where.

    Returns:
        (bound, clipped), each [B, T]; the bound has no meaning where ``clipped`` is False.
    """
    upper = math.log1p(config.upper_epsilon)
    lower = math.log1p(-config.clip_epsilon)
    above = (advantage > 0) & (log_ratio > upper)
    below = (advantage < 0) & (log_ratio < lower)
    bound = torch.where(above, upper, torch.full_like(log_ratio, lower))
    clipped = above | below
    if config.dual_clip is not None:
        most = math.log(config.dual_clip)
        dual = (advantage < 0) & (log_ratio > most)
        bound = torch.where(dual, most, bound)
        clipped = clipped | dual
    return bound, clipped


def _check(tensors: tuple[Tensor, ...], loss_mask: Tensor, num_tokens: float | None) -> None:
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be boolean, got {loss_mask.dtype}.")
    names = ("target", "proximal", "segment", "behavior", "advantages")
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, tensors, strict=True)}
    if any(shape != tuple(loss_mask.shape) for shape in shapes.values()):
        raise ValueError(
            f"every tensor must be {tuple(loss_mask.shape)}, as loss_mask is; got {shapes}."
        )
    if num_tokens is not None and not 0 <= num_tokens < math.inf:
        raise ValueError(f"num_tokens must be finite and 0 or more, got {num_tokens}.")
