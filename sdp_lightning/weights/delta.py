"""What changed of weights since the last publish: positions and values, with a sum of the result.

Pure functions of tensors on the CPU. Of a tensor NAME a delta has, under these names:

- ``NAME.delta_gaps``, ``NAME.delta_values``: for each changed value the number of unchanged ones
  before it, in bytes (255 stands for 255 unchanged ones and no change), and the value; or
  ``NAME``, all of its values, if that takes less room;
- ``NAME.delta_sum``: [8] bytes, a checksum of all its values after the change.

A tensor that did not change is not in a delta. Values are compared by their bits, so applying a
delta gives the bits that a full transfer would. Servers of small types profit: at a learning rate
of 1e-6 a step changes few bfloat16 values, and nearly all float32 ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping

import numpy as np
import torch
from torch import Tensor

from sdp_lightning.errors import EngineError

_GAPS, _VALUES, _SUM = ".delta_gaps", ".delta_values", ".delta_sum"
_SKIP = 255
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode(name: str, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The part of ``name`` in a delta from ``before`` to ``after``; empty if nothing changed.

    Raises:
        EngineError: if shape or type changed.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        raise EngineError(
            f"{name} was {before.dtype} of shape {tuple(before.shape)} at the last publish and is "
            f"{after.dtype} of {tuple(after.shape)}: a delta needs the same. Start the run anew."
        )
    places = (_bits(before) != _bits(after)).nonzero().flatten()
    if not places.numel():
        return {}
    skipped = places.diff(prepend=places.new_tensor([-1])) - 1
    escapes = skipped // _SKIP
    num_gaps = places.numel() + int(escapes.sum())
    total = {name + _SUM: checksum(after)}
    if num_gaps + places.numel() * after.itemsize >= after.nbytes:
        return {name: after.clone(), **total}
    gaps = torch.full((num_gaps,), _SKIP, dtype=torch.uint8)
    gaps[(escapes + 1).cumsum(0) - 1] = (skipped % _SKIP).to(torch.uint8)
    return {name + _GAPS: gaps, name + _VALUES: after.reshape(-1)[places], **total}


def apply(weights: MutableMapping[str, Tensor], delta: Mapping[str, Tensor]) -> None:
    """Change ``weights`` in place by ``delta``, and check the sum of every tensor that changed.

    Raises:
        EngineError: naming a tensor that is not there or does not fit, or whose result is not the
            trainer's. ``weights`` are then of no use.
    """
    for name in (key.removesuffix(_SUM) for key in delta if key.endswith(_SUM)):
        if name not in weights:
            raise EngineError(f"the delta changes {name}, which the last anchor did not bring.")
        target, whole = weights[name], delta.get(name)
        try:
            if whole is not None:
                target.copy_(whole)
            else:
                steps = delta[name + _GAPS].long()
                is_value = steps != _SKIP
                places = (steps + is_value).cumsum(0)[is_value] - 1
                target.reshape(-1)[places] = delta[name + _VALUES]
        except (IndexError, KeyError, RuntimeError) as error:
            raise EngineError(f"the delta of {name} does not fit it: {error}") from error
        if not checksum(target).equal(delta[name + _SUM]):
            raise EngineError(
                f"{name} is not what the trainer has after the delta: a delta was left out, or "
                "changed on its way."
            )


def checksum(tensor: Tensor) -> Tensor:
    """[8] bytes that depend on every bit of ``tensor``."""
    content = _bits(tensor).numpy().data.cast("B")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return torch.from_numpy(np.frombuffer(digest, dtype=np.uint8).copy())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.itemsize])
