"""Rotary positions whose frequencies depend on a row's length: ``longrope`` and ``dynamic``.

transformers takes them from the longest row of a forward pass, and ``dynamic`` keeps those of the
longest pass so far. Here every row has those of its own length, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_BY_LENGTH = {"dynamic", "longrope"}
_ORIGINAL = "original_inv_freq"  # buffers, after the kind of layer where there are several


def rotate_rows_alone(policy: nn.Module) -> None:
    """Give each row of a padded batch the frequencies of its own length, up to its last token."""
    for module in rotaries_by_length(policy):
        module.forward = MethodType(_row_by_row, module)


def rotaries_by_length(policy: nn.Module) -> Iterator[Any]:
    """Modules that compute rotary positions by the length of what they are given."""
    for module in policy.modules():
        # foreign: rotary modules of transformers have this setting, one or one for a kind of layer
        kinds = getattr(module, "rope_type", None)
        if not _BY_LENGTH.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds]):
            yield module


def _row_by_row(module: Any, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
    rows: list[Any] = []
    for row in range(len(position_ids)):
        _start_anew(module)
        one = slice(row, row + 1)
        rows.append(type(module).forward(module, x[one], position_ids[one], *args, **options))
    if isinstance(rows[0], Tensor):
        return torch.cat(rows)
    return tuple(torch.cat(tables) for tables in zip(*rows, strict=True))  # cosines and sines


def _start_anew(module: Any) -> None:
    """Forget the frequencies of an earlier, longer row."""
    for name, frequencies in [*module.named_buffers()]:
        kind, found, _ = name.partition(_ORIGINAL)
        if found:
            current = frequencies.clone()  # transformers may write into it
            module.register_buffer(f"{kind}inv_freq", current, persistent=False)
            setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)
