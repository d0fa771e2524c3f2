"""Surrogates: the term of one token in the objective, given its weight and its ratio.

Pure functions on [B, T]. Letters: n target, m centre, b behavior; w = exp(m - b), r = exp(n - m).
Each returns (value, bounded): the value, to be maximized, is 0 where a token is rejected or has no
advantage; bounded says where a bound replaces the measured ratio. Exponents are masked before exp:
an overflow at a token that does not count would give nan * 0. For one that counts, exp(log w r)
goes on as its tangent above 20 nats (:func:`~sdp_lightning.objective.precision.bounded_log`): where
A < 0 nothing else bounds r without a dual clip, and a rejection on the drift bounds no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective.aggregation import sequence_mean
from sdp_lightning.objective.precision import bounded_log
from sdp_lightning.objective.rejection import outside_region


def surrogate(
    target: Tensor,
    log_weight: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    kept: Tensor,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """(value, bounded) of the surrogate that ``config`` names; ``kept`` is [B, T] bool."""
    if config.surrogate == "ppo":
        return ppo(log_weight, log_ratio, advantages, kept, config)
    if config.surrogate == "cispo":
        return cispo(target, log_weight + log_ratio, advantages, kept, config)
    if config.surrogate == "unclipped":
        return unclipped(log_weight + log_ratio, advantages, kept)
    function = _load_surrogate(config.surrogate)
    result = function(target, log_weight, log_ratio, advantages, kept, config)
    return _checked(result, kept, config.surrogate)


def ppo(
    log_weight: Tensor, log_ratio: Tensor, advantages: Tensor, kept: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""The pessimistic minimum of the clipped and the whole ratio.

    .. math:: w \min(r A, \mathrm{clip}(r, 1-\epsilon, 1+\epsilon_{high}) A)

    and with a dual clip c, where A < 0, at least w c A. A bounded token has no gradient. Sources:
    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; clip-higher: DAPO,
    https://arxiv.org/abs/2503.14476; dual clip: Ye et al. 2019, https://arxiv.org/abs/1912.09729.
    """
    measured = log_ratio.detach()
    above, below = outside_region(measured, advantages, config)
    upper, lower = math.log1p(config.upper_epsilon), math.log1p(-config.clip_epsilon)
    bound = torch.where(above, upper, torch.full_like(measured, lower))
    clipped = above | below
    if config.dual_clip is not None:
        most = math.log(config.dual_clip)
        dual = (advantages < 0) & (measured > most)
        bound = torch.where(dual, most, bound)
        clipped = clipped | dual
    log_value = log_weight + torch.where(clipped, bound, log_ratio)
    return _times_advantage(log_value, advantages, kept), clipped


def unclipped(log_importance: Tensor, advantages: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    r"""The importance-weighted advantage.

    .. math:: w r A = e^{n - b} A \quad\text{where the weight is not truncated}

    Its gradient is that of the policy gradient under the target policy, token by token.
    """
    value = _times_advantage(log_importance, advantages, kept)
    return value, torch.zeros_like(kept)


def cispo(
    target: Tensor, log_importance: Tensor, advantages: Tensor, kept: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""A policy gradient whose importance weight is clamped from above and not followed.

    .. math:: \mathrm{sg}[\min(w r, 1 + \epsilon_{high})] \, A \, n

    Every token keeps a gradient, whatever its ratio. The paper writes a lower bound, too, and then
    says that it is switched off. Source: MiniMax-M1, https://arxiv.org/abs/2506.13585.
    """
    upper = math.log1p(config.upper_epsilon)
    measured = log_importance.detach()
    weighted = _times_advantage(measured.clamp(max=upper), advantages, kept)
    acting = kept & (advantages != 0)
    return weighted * torch.where(acting, target, 0.0), measured > upper


def of_sequences(log_weight: Tensor, log_ratio: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weight and ratio of a whole sequence, in place of those of its tokens.

    .. math:: s_i = \exp\Big(\frac{1}{|o_i|} \sum_t \log r_{it}\Big), \quad
        s_{it} = \mathrm{sg}[s_i] \, e^{n_{it} - \mathrm{sg}[n_{it}]}

    the second being what stands in the loss: its value is the ratio of the sequence, and each token
    has the gradient of its own log-prob, as in GSPO-token. With one advantage for the row and
    everything kept, the gradient is that of s_i. The weight is the geometric mean likewise, so that
    w s is exp(mean(n - b)) around every centre. Source: Zheng et al. 2025 (GSPO),
    https://arxiv.org/abs/2507.18071.

    Args:
        log_weight: [B, T].
        log_ratio: [B, T], with the gradient of n.
        loss_mask: [B, T] bool.

    Returns:
        The two, [B, T]; log w and the value of log s are equal along a row.
    """
    measured = log_ratio.detach()
    own_gradient = log_ratio - measured
    weight = sequence_mean(log_weight, loss_mask).expand_as(log_weight)
    return weight, sequence_mean(measured, loss_mask) + own_gradient


def _times_advantage(log_value: Tensor, advantages: Tensor, kept: Tensor) -> Tensor:
    """exp(log_value), bounded, * A where a token is kept and has an advantage, else 0."""
    acting = kept & (advantages != 0)
    weighted = bounded_log(torch.where(acting, log_value, 0.0)).exp()
    return weighted * torch.where(acting, advantages, 0.0)


@cache
def _load_surrogate(path: str) -> Callable[..., object]:
    """The user's function at an import path."""
    function = load_object(path)
    if not callable(function):
        raise ConfigError(f"surrogate={path!r} is no function, but {type(function).__name__}.")
    return function


def _checked(result: object, kept: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """(value, bounded) from a user's function, 0 and False where a token is not kept."""
    pair = cast("tuple[object, ...]", result) if isinstance(result, tuple) else ()
    shapes = [tuple(part.shape) for part in pair if isinstance(part, Tensor)]
    if len(pair) != 2 or shapes != [tuple(kept.shape)] * 2:
        raise ConfigError(
            f"surrogate={path!r} must return (value, bounded), two tensors of "
            f"{tuple(kept.shape)}; it returned {type(result).__name__} with shapes {shapes}."
        )
    value, bounded = cast("tuple[Tensor, Tensor]", pair)
    return torch.where(kept, value, 0.0), bounded.bool() & kept
