"""Masks of attention that transformers does not build: of rows of unlike length, of packed rows.

A model asks for each of its masks by a rule of two positions (causal, a sliding window, chunks).
Whoever lays tokens out in another way applies that rule to the positions that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

# Whether a token sees another: of its row, its head, its position, and the other's position.
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAUSAL = cast(MaskRule, causal_mask_function)
MakeMask = Callable[..., Tensor | None]


def extend_masks(make: MakeMask) -> None:
    """Have ``make`` build masks for sdpa and eager attention in this process.

    Args:
        make: a function of the arguments of transformers' own, all by name; of a layout that it
            does not know it returns None, and transformers builds the mask. True is attended to.
    """
    for name in ("sdpa", "eager"):
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]
        AttentionMaskInterface.register(name, partial(_build, own, make, name == "eager"))


def _build(own: MakeMask, make: MakeMask, added: bool, **options: Any) -> Tensor | None:
    mask = make(**options)
    if mask is None:
        return own(**options)
    if not added:
        return mask
    dtype: torch.dtype = options["dtype"]  # eager attention adds its mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
