"""Segment proximal log-probs q, and log-linear substitutes for a forward pass.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal, n target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdp_lightning.config import MissingProximal
from sdp_lightning.objective.precision import at_least_float32


def complete_segment_logprobs(
    segment: Tensor,
    scored: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    lags: Tensor,
    missing: MissingProximal,
) -> Tensor:
    """Segment proximal log-probs q for every token, also those that nobody scored in time.

    A token of lag 1 takes x, because the policy after its own is the proximal policy of this step;
    so does one of lag 0, whose own policy it is. An older token that was scored keeps its score.

    Args:
        segment: [...] the scores; read only where ``scored`` and the lag is at least 2.
        scored: [...] bool.
        proximal: [...] x.
        behavior: [...] b.
        lags: [...] integers k, 0 where there is no token to train.
        missing: substitute at k >= 2 without a score: ``"behavior"`` takes b, ``"decoupled"``
            takes x, ``"loglinear"`` takes b + (x - b) / k.

    Returns:
        [...] q, detached, at least float32.

    Raises:
        ValueError: for an unscored token of lag >= 2 under ``"drop"``: its group should have been
            dropped before it reached a batch.
    """
    segment, proximal, behavior = (
        at_least_float32(t.detach()) for t in (segment, proximal, behavior)
    )
    old = lags >= 2
    if missing == "drop":
        count = int((old & ~scored).sum())
        if count:
            raise ValueError(
                f"{count} tokens of lag 2 or more have no segment proximal: under "
                "missing_proximal='drop' their groups must be dropped before they are collated."
            )
        substitute = proximal
    elif missing == "behavior":
        substitute = behavior
    elif missing == "decoupled":
        substitute = proximal
    else:
        substitute = loglinear_segment(proximal, behavior, lags)
    return torch.where(old, torch.where(scored, segment, substitute), proximal)


def loglinear_proximal(target: Tensor, behavior: Tensor, lags: Tensor, share_done: float) -> Tensor:
    r"""Proximal log-probs x without a forward: on the straight way from b to n.

    .. math:: x \approx b + (n - b) \, k / (k + f)

    A token of lag k was sampled k versions before this step, and n is f steps into it. At k = 0 the
    proximal policy is the token's own: b, or n itself before the first update. Source: AReaL,
    https://arxiv.org/abs/2505.24298, whose code has it with f = 1.

    Args:
        target: [...] n; its gradient is not followed.
        behavior: [...] b.
        lags: [...] integers k, 0 or more.
        share_done: f in [0, 1): the share of this step's optimizer updates already made.

    Returns:
        [...] x, detached, at least float32. Exact at f = 0, and where log-probs move on a line.

    Raises:
        ValueError: if ``share_done`` is not in [0, 1).
    """
    if not 0 <= share_done < 1:
        raise ValueError(f"share_done must be in [0, 1), got {share_done}.")
    target, behavior = (at_least_float32(t.detach()) for t in (target, behavior))
    if share_done == 0:
        return target
    steps = lags.to(target)
    return torch.lerp(behavior, target, steps / (steps + share_done))


def loglinear_segment(proximal: Tensor, behavior: Tensor, lags: Tensor) -> Tensor:
    r"""Segment proximal log-probs q without a score: on the straight way from b to x.

    .. math:: q \approx b + (x - b) / k, \quad q = x \;\text{for}\; k \le 1

    With x of :func:`loglinear_proximal` this is b + (n - b) / (k + f).

    Args:
        proximal: [...] x.
        behavior: [...] b.
        lags: [...] integers k, 0 or more.

    Returns:
        [...] q, detached, at least float32.
    """
    proximal, behavior = (at_least_float32(t.detach()) for t in (proximal, behavior))
    return torch.lerp(behavior, proximal, 1 / lags.clamp(min=1).to(proximal))
