"""The precision in which the objective is computed, and the range of its exponents."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG = 20.0  # nats; e^20 is 5e8, whose square still fits float32


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers; halves become float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def bounded_log(log_value: Tensor) -> Tensor:
    r"""The log of an exponential that goes on as its tangent above ``LARGEST_LOG``, here L.

    .. math:: e^{l} \;\text{for}\; l \le L, \quad e^{L} (1 + l - L) \;\text{above}

    So exp of the result has a slope of at most exp(L) and, for a finite l, one above 0: what is too
    far off still moves back.

    Args:
        log_value: [...] l, nats.

    Returns:
        [...], exactly l up to L.
    """
    beyond = (log_value - LARGEST_LOG).clamp(min=0)
    return torch.where(log_value > LARGEST_LOG, LARGEST_LOG + beyond.log1p(), log_value)
