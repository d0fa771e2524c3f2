"""The precision in which the objective is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers; halves become float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
