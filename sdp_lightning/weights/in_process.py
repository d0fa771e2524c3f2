"""Copies weights into a module of the same process, after checks.

No threads and no versions: the caller ensures that nobody uses the module meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sdp_lightning.errors import EngineError

_SHOWN = 5  # names that an error lists


def check_weights(source: Sequence[tuple[str, Tensor]], model: nn.Module, *, full: bool) -> None:
    """Refuse weights that do not fit ``model``. Nothing is copied.

    Args:
        source: names and tensors as in ``model.state_dict()``. Of names that share one tensor (a
            tied ``lm_head``) any may be absent, and those present must agree. The values of tensors
            on the meta device are not known yet and not compared.
        model: the target.
        full: whether ``source`` must have every tensor of the model.

    Raises:
        EngineError: naming unknown, duplicate, misshapen, contradictory or missing weights.
    """
    target = model.state_dict()
    names = [name for name, _ in source]
    if unknown := [name for name in names if name not in target]:
        raise EngineError(
            f"the engine's model has no weights named {_shorten(unknown)}. Send names as in the "
            "state_dict of the same model class, without a wrapper's prefix."
        )
    if len(set(names)) != len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise EngineError(f"weights sent twice in one update: {_shorten(doubled)}.")
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in source:
        if tensor.shape != target[name].shape:
            raise EngineError(
                f"{name} has shape {tuple(tensor.shape)}, but the engine's model holds "
                f"{tuple(target[name].shape)}. Trainer and engine must load the same model."
            )
        memory = target[name].data_ptr()
        if memory in seen and not _agree(seen[memory][1], tensor):
            raise _contradiction(seen[memory][0], name)
        seen[memory] = (name, tensor)
    missing = [name for name, tensor in target.items() if tensor.data_ptr() not in seen]
    if full and missing:
        raise EngineError(
            f"a reset needs every weight, but {_shorten(missing)} are missing. Send the whole "
            "state_dict (tied names may be left out)."
        )


def copy_weights(source: Iterable[tuple[str, Tensor]], model: nn.Module) -> int:
    """Copy each tensor of ``source`` into ``model`` in place; the copies are done on return.

    Args:
        source: names and tensors that :func:`check_weights` accepted, of any dtype and device. Each
            is freed before the next one is requested, unless it is tied to another.
        model: the target, which nobody reads meanwhile.

    Returns:
        Bytes sent, a tied tensor counted once.

    Raises:
        EngineError: if tied weights, which were on the meta device before, contradict each other.
    """
    target = model.state_dict()
    num_names = Counter(tensor.data_ptr() for tensor in target.values())
    tied: dict[int, tuple[str, Tensor]] = {}
    devices: set[torch.device] = set()
    num_bytes = 0
    with torch.no_grad():
        for name, tensor in source:
            memory = target[name].data_ptr()
            if memory in tied:
                if not _agree(tied[memory][1], tensor):
                    raise _contradiction(tied[memory][0], name)
                continue
            target[name].copy_(tensor.detach())
            if num_names[memory] > 1:
                tied[memory] = name, tensor
            devices.update((target[name].device, tensor.device))
            num_bytes += tensor.numel() * tensor.element_size()
            del tensor
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the reader may use another stream
    return num_bytes


def _contradiction(first: str, second: str) -> EngineError:
    return EngineError(
        f"{first} and {second} are one tied tensor in the engine's model but were sent with "
        "different values. Tie them in the trainer too, or untie the engine's."
    )


def _agree(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or second.is_meta:
        return True  # not known yet
    same_memory = first.device == second.device and first.data_ptr() == second.data_ptr()
    return same_memory or torch.equal(first, second.to(first.device))


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
