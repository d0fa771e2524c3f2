"""A digest that tells two sets of weights apart, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

_NUM_SAMPLES = 256  # numbers of each weight that the digest covers


def weights_digest(weights: Mapping[str, Any]) -> str:
    """Digest of weights: names, shapes and dtypes, and numbers of each at equal distances.

    Sharded weights are gathered one at a time: all ranks must call this.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        # foreign: a DTensor of torch
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        flat = whole.flatten()
        sample = flat[:: max(1, flat.numel() // _NUM_SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        as_bytes = sample[:0].byte().dtype
        digest.update(sample.view(as_bytes).numpy().tobytes())
    return digest.hexdigest()
