"""Fixed rows of keys and values (KV), and a record of the tokens of each row.

Rows that decode together are adjacent, from row 0, so that a step reads views of the buffers and
copies only its own new keys and values. No scheduling and no sampling.

B rows of one forward, W new tokens of each (left-padded), L the KV length in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from sdp_lightning.errors import EngineError
from sdp_lightning.types import IntArray

ATTENTION_NAME = "sdp_slots"
_GROWTH = 64  # tokens; KV length is allocated in multiples of this


@dataclass
class _Window:
    """The part of the buffers that the next forward reads and writes.

    Attributes:
        first, last: rows [first, last).
        index: ``[B, 1]`` and ``[B, W]``: row within the window and position of each new token.
        length: L.
    """

    first: int
    last: int
    index: tuple[Tensor, Tensor]
    length: int


class KVCache:
    """KV rows that grow on demand; each has a record of its tokens and of the weights' version.

    A row's record is exact: positions [0, length) hold the KV of its tokens, and its version is the
    oldest that computed any of them. Padding is written to one position past the capacity, which is
    never read.
    """

    def __init__(self, num_layers: int, max_rows: int, device: torch.device) -> None:
        self.num_rows = 0
        self.capacity = 0
        self.device = device
        self._max_rows = max_rows
        self._layers = [_CacheLayer(self) for _ in range(num_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._tokens: IntArray = np.zeros((0, 0), dtype=np.int64)
        self._lengths: IntArray = np.zeros(0, dtype=np.int64)
        self._versions: IntArray = np.zeros(0, dtype=np.int64)
        self.window = _Window(0, 0, (torch.empty(0), torch.empty(0)), 0)

    def reserve(self, num_rows: int, length: int) -> None:
        """Allocate at least ``num_rows`` rows of ``length`` tokens, keeping their content."""
        if num_rows <= self.num_rows and length <= self.capacity:
            return
        if num_rows > self.num_rows:
            num_rows = min(self._max_rows, max(num_rows, 2 * self.num_rows, 8))
        if length > self.capacity:
            length = -(-max(length, self.capacity * 3 // 2) // _GROWTH) * _GROWTH
        rows, capacity = max(num_rows, self.num_rows), max(length, self.capacity)
        old_rows, old_capacity = self.num_rows, self.capacity
        tokens = np.zeros((rows, capacity), dtype=np.int64)
        tokens[:old_rows, :old_capacity] = self._tokens
        self._tokens = tokens
        added = rows - old_rows
        self._lengths = np.pad(self._lengths, (0, added))
        self._versions = np.pad(self._versions, (0, added))
        self.num_rows, self.capacity = rows, capacity
        for layer in self._layers:
            layer.grow(old_rows, old_capacity)

    def longest_prefix(self, tokens: IntArray, version: int) -> tuple[int, int]:
        """Find the row of ``version`` with the longest common prefix; returns row and length."""
        width = min(tokens.size, self.capacity)
        if width == 0 or self.num_rows == 0:
            return 0, 0
        differs = self._tokens[:, :width] != tokens[:width]
        shared = np.where(differs.any(1), differs.argmax(1), width)
        shared = np.minimum(shared, self._lengths)
        shared[self._versions != version] = 0
        row = int(shared.argmax())
        return row, int(shared[row])

    def move(self, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy the first ``lengths`` tokens of rows ``sources`` to rows ``targets``.

        All rows are read before any is written, so this also permutes.
        """
        self._tokens[targets] = self._tokens[sources]
        self._versions[targets] = self._versions[sources]
        self._lengths[targets] = lengths
        moving = [k for k, source in enumerate(sources) if source != targets[k] and lengths[k]]
        if not moving:
            return
        source = torch.tensor([sources[k] for k in moving], device=self.device)
        target = torch.tensor([targets[k] for k in moving], device=self.device)
        length = max(lengths[k] for k in moving)
        for layer in self._layers:
            layer.move(source, target, length)

    def swap(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Exchange rows pairwise."""
        sources, targets = [*first, *second], [*second, *first]
        self.move(sources, targets, [int(self._lengths[row]) for row in sources])

    def hold(self, first: int, tokens: Sequence[IntArray], version: int) -> None:
        """Record that rows from ``first`` on hold ``tokens``, computed under ``version``."""
        for row, held in enumerate(tokens, first):
            self._tokens[row, : held.size] = held
            self._lengths[row] = held.size
            self._versions[row] = version

    def extend(self, positions: IntArray, tokens: IntArray) -> None:
        """Record one more token of each row from 0 on, computed under its row's version."""
        rows = np.arange(positions.size)
        self._tokens[rows, positions] = tokens
        self._lengths[: positions.size] = positions + 1

    def clear(self) -> None:
        """Clear every row."""
        self._lengths[:] = 0
        for layer in self._layers:
            layer.clear()

    def forward(
        self, model: nn.Module, first: int, tokens: NDArray[Any], starts: IntArray
    ) -> Tensor:
        """Run the model on new tokens of B rows and store their KV.

        Args:
            model: a transformers causal LM.
            first: index of the first row.
            tokens: ``[B]`` object array of int arrays: tokens [start, end) of each row.
            starts: ``[B]`` number of tokens of each row whose KV is stored already.

        Returns:
            ``[B, V]`` logits after the last token of each row.
        """
        counts = np.array([new.size for new in tokens])
        width = int(counts.max())
        offsets = np.arange(width) - (width - counts)[:, None]
        positions = starts[:, None] + offsets
        ids = np.zeros(offsets.shape, dtype=np.int64)
        ids[offsets >= 0] = np.concatenate(list(tokens))
        host = np.stack(
            (ids, np.maximum(positions, 0), np.where(offsets >= 0, positions, self.capacity))
        )
        batch = torch.from_numpy(host).to(self.device)
        length = int((starts + counts).max())
        rows = torch.arange(len(tokens), device=self.device)[:, None]
        self.window = _Window(first, first + len(tokens), (rows, batch[2]), length)
        mask = torch.arange(length, device=self.device) <= batch[1][:, None, :, None]
        output = model(
            input_ids=batch[0],
            attention_mask=mask,
            position_ids=batch[1],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


class _CacheLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[rows, heads, capacity + 1, head_dim]`` each."""

    is_compileable = False
    is_sliding = False

    def __init__(self, kv_cache: KVCache) -> None:
        super().__init__()
        self._kv_cache = kv_cache
        self._buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self._kv_cache.num_rows, self._kv_cache.capacity
        self._buffers = [
            states.new_zeros(rows, states.shape[1], capacity + 1, states.shape[3])
            for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._kv_cache.window
        rows, positions = window.index
        views: list[Tensor] = []
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            view = buffer[window.first : window.last]
            view[rows, :, positions] = states.transpose(1, 2)
            views.append(view[:, :, : window.length])
        return views[0], views[1]

    def grow(self, old_rows: int, old_capacity: int) -> None:
        rows, capacity = self._kv_cache.num_rows, self._kv_cache.capacity
        for index, old in enumerate(self._buffers):
            new = old.new_zeros(rows, old.shape[1], capacity + 1, old.shape[3])
            new[:old_rows, :, :old_capacity] = old[:, :, :old_capacity]
            self._buffers[index] = new

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self) -> None:
        for buffer in self._buffers:
            buffer.zero_()  # masked KV is still multiplied by 0, which does not remove a nan

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kv_cache.window.length, 0

    def get_seq_length(self) -> int:
        return self._kv_cache.window.length

    def get_max_length(self) -> int:
        return self._kv_cache.capacity


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that does not repeat KV heads: it stacks the queries of one KV head.

    Args:
        module: unused; part of transformers' interface.
        query: ``[B, heads, W, D]``.
        key: ``[B, kv_heads, L, D]``; heads is a multiple of kv_heads.
        value: ``[B, kv_heads, L, D]``.
        attention_mask: ``[B, 1, W, L]``, True at positions that are attended to.
        **kwargs: ``scaling`` is used.

    Returns:
        ``[B, W, heads, D]``, and None in place of attention weights.

    Raises:
        EngineError: if the model needs an attention feature that this function lacks.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise EngineError(f"the model's attention needs {name}, which this engine lacks.")
    batch, heads, width, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    stacked = query.reshape(batch, kv_heads, groups * width, query.shape[3])
    mask = (
        attention_mask.expand(-1, -1, groups, -1)
        if width == 1
        else attention_mask.repeat(1, 1, groups, 1)
    )
    output = functional.scaled_dot_product_attention(
        stacked, key, value, attn_mask=mask, scale=kwargs.get("scaling")
    )
    return output.reshape(batch, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
