"""The centre of the trust region, the behavior weight that leads there, and the bridge in between.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal. What is masked out must be replaced before it comes here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective.precision import at_least_float32


def past_centre(segment: Tensor, behavior: Tensor, lags: Tensor) -> Tensor:
    """Centre of ``trust_region="past"``: q, but b at lag 1.

    There q is x, the policy in training: in the first update nothing would be clipped, however far
    a token has moved since it was sampled. The centre is thus older than x at every lag but 0.

    Args:
        segment: [...] q, completed.
        behavior: [...] b.
        lags: [...] integers, 0 or more.

    Returns:
        [...] detached, at least float32.
    """
    segment, behavior = (at_least_float32(t.detach()) for t in (segment, behavior))
    return torch.where(lags == 1, behavior, segment)


def centre_and_log_weight(
    proximal: Tensor, segment: Tensor, behavior: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    r"""Centre m of the trust region, and log w, the correction from behavior to centre.

    .. math:: \log w = (q - b) + \lambda \min(\log C, x - q) \quad\text{for a proximal centre}

    and m - b otherwise. q is read only if the estimator needs it.

    Args:
        proximal: [...] x.
        segment: [...] q; around ``"past"`` the :func:`past_centre`.
        behavior: [...] b.
        config: trust region, bridge exponent and bridge cap.

    Returns:
        (m, log w), each [...].
    """
    if config.trust_region == "behavior":
        return behavior, torch.zeros_like(behavior)
    if config.trust_region in ("segment", "past"):
        return segment, segment - behavior
    if not config.needs_segment_proximal:
        return proximal, proximal - behavior
    bridge = proximal - segment
    if config.bridge_cap is not None:
        bridge = bridge.clamp(max=math.log(config.bridge_cap))
    return proximal, (segment - behavior) + config.bridge_exponent * bridge
