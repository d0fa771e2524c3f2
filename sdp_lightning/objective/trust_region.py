"""Centre of the trust region, behavior weight exp(m - b), and the bridge exp(x - q) in it.

Pure functions on detached log-probs of one shape, in nats: b behavior, q segment proximal,
x proximal. Masked values must be replaced before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdp_lightning.config import LossConfig


def centre_and_log_weight(
    proximal: Tensor,
    segment: Tensor,
    behavior: Tensor,
    config: LossConfig,
    lags: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Centre m of the trust region, and log w, the correction from behavior to centre.

    .. math:: \log w = (q - b) + \lambda \min(\log C, x - q) \quad\text{for a proximal centre}

    and m - b otherwise. q is read only if the estimator needs it.

    The centre ``"past"`` is q, but b at lag 1. There q is x, the policy in training: in the first
    update nothing would be clipped, however far a token has moved since it was sampled. This centre
    is older than x at every lag but 0.

    Args:
        proximal: [...] x.
        segment: [...] q, completed.
        behavior: [...] b.
        config: trust region, bridge exponent and bridge cap.
        lags: [...] integers, 0 or more; read only around ``"past"``.

    Returns:
        (m, log w), each [...].

    Raises:
        ValueError: if the centre is ``"past"`` and ``lags`` is None.
    """
    if config.trust_region == "behavior":
        return behavior, torch.zeros_like(behavior)
    if config.trust_region == "segment":
        return segment, segment - behavior
    if config.trust_region == "past":
        if lags is None:
            raise ValueError(
                "trust_region='past' needs the lag of every token: pass lags=, for example "
                "batch.lags, or use trust_region='segment'."
            )
        past = torch.where(lags == 1, behavior, segment)
        return past, past - behavior
    if not config.needs_segment_proximal:
        return proximal, proximal - behavior
    bridge = proximal - segment
    if config.bridge_cap is not None:
        bridge = bridge.clamp(max=math.log(config.bridge_cap))
    return proximal, (segment - behavior) + config.bridge_exponent * bridge
