"""Fixed rows of keys and values (KV), and a record of the tokens of each row.

Rows that decode together are adjacent, from row 0, so that a step reads views of the buffers and
copies only its own new keys and values. No scheduling and no sampling.

B rows of one forward, W new tokens of each (left-padded), L the KV length in use.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdp_lightning.types import IntArray

_GROWTH = 64  # tokens; KV length is allocated in multiples of this
_CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def cache_argument(model: Any) -> str:
    """Name of the argument by which a causal LM takes its cache.

    That of its own forward, since a model with code of its own keeps the name that it was written
    with; if the forward hides its arguments, that of this release of transformers.
    """
    returned = (field.name for field in fields(CausalLMOutputWithPast))
    named = [*inspect.signature(model.forward).parameters, *returned]
    return next(name for name in named if name in _CACHE_NAMES)


@dataclass
class _Window:
    """The part of the buffers that the next forward reads and writes.

    Attributes:
        first, last: rows [first, last).
        index: ``[B, 1]`` and ``[B, W]``: row within the window and position of each new token.
        offsets: ``[B, 1, 1, 1]`` position of the first new token, padding included.
        length: L.
        width: W.
    """

    first: int
    last: int
    index: tuple[Tensor, Tensor]
    offsets: Tensor
    length: int
    width: int


class KVCache:
    """KV rows that grow on demand; each has a record of its tokens and of the weights' version.

    A row's record is exact: positions [0, length) hold the KV of its tokens, and its version is the
    oldest that computed any of them. Padding is written to one position past the capacity, which is
    never read.

    Args:
        num_layers: decoder layers of the model.
        max_rows: most rows that there will be.
        device: where KV is kept.
        rows_alone: one forward for each row, for models that take positions to be the same in all.
    """

    def __init__(
        self, num_layers: int, max_rows: int, device: torch.device, *, rows_alone: bool = False
    ) -> None:
        self._rows_alone = rows_alone
        self.num_rows = 0
        self.capacity = 0
        self.device = device
        self._max_rows = max_rows
        self._layers = [_CacheLayer(self) for _ in range(num_layers)]
        self._cache = _Cache(self, self._layers)
        self._tokens: IntArray = np.zeros((0, 0), dtype=np.int64)
        self._lengths: IntArray = np.zeros(0, dtype=np.int64)
        self._versions: IntArray = np.zeros(0, dtype=np.int64)
        nothing = torch.empty(0)
        self.window = _Window(0, 0, (nothing, nothing), nothing, 0, 0)

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
        if not self._rows_alone:
            return self._forward(model, first, tokens, starts)
        rows = range(len(tokens))
        return torch.cat(
            [self._forward(model, first + r, tokens[r : r + 1], starts[r : r + 1]) for r in rows]
        )

    def _forward(
        self, model: nn.Module, first: int, tokens: NDArray[Any], starts: IntArray
    ) -> Tensor:
        counts = np.array([new.size for new in tokens])
        width = int(counts.max())
        offsets = np.arange(width) - (width - counts)[:, None]
        positions = starts[:, None] + offsets
        ids = np.zeros(offsets.shape, dtype=np.int64)
        ids[offsets >= 0] = np.concatenate(list(tokens))
        host = np.stack((ids, positions, np.where(offsets >= 0, positions, self.capacity)))
        batch = torch.from_numpy(host).to(self.device)
        length = int((starts + counts).max())
        rows = torch.arange(len(tokens), device=self.device)[:, None]
        begins = batch[1, :, 0, None, None, None]
        self.window = _Window(first, first + len(tokens), (rows, batch[2]), begins, length, width)
        output = model(
            input_ids=batch[0],
            position_ids=batch[1].clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): self._cache},
        )
        return output.logits[:, -1]


class _Cache(Cache):
    """The layers, and where each row's new tokens are: see :func:`.attention.rows_mask`."""

    def __init__(self, kv_cache: KVCache, layers: Sequence[CacheLayerMixin]) -> None:
        super().__init__(layers=list(layers))
        self._kv_cache = kv_cache

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self._kv_cache.window.offsets


class _CacheLayer(CacheLayerMixin):
    """What one layer keeps of each token, by name: ``[rows, heads, capacity + 1, head_dim]``."""

    is_compileable = False
    is_sliding = False

    def __init__(self, kv_cache: KVCache) -> None:
        super().__init__()
        self._kv_cache = kv_cache
        self._buffers: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a buffer is made at its first use."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._store("keys", key_states), self._store("values", value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Keys ``[B, W, D]`` by which a layer chooses the tokens that it attends to."""
        return self._store("index", indexer_key_states[:, None])[:, 0]

    def _store(self, name: str, states: Tensor) -> Tensor:
        if name not in self._buffers:
            rows, capacity = self._kv_cache.num_rows, self._kv_cache.capacity
            shape = rows, states.shape[1], capacity + 1, states.shape[3]
            self._buffers[name] = states.new_zeros(shape)
        window = self._kv_cache.window
        rows, positions = window.index
        view = self._buffers[name][window.first : window.last]
        view[rows, :, positions] = states.transpose(1, 2)
        return view[:, :, : window.length]

    def grow(self, old_rows: int, old_capacity: int) -> None:
        rows, capacity = self._kv_cache.num_rows, self._kv_cache.capacity
        for name, old in self._buffers.items():
            new = old.new_zeros(rows, old.shape[1], capacity + 1, old.shape[3])
            new[:old_rows, :, :old_capacity] = old[:, :, :old_capacity]
            self._buffers[name] = new

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        for buffer in self._buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self) -> None:
        for buffer in self._buffers.values():
            buffer.zero_()  # masked KV is still multiplied by 0, which does not remove a nan

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kv_cache.window.length, 0

    def get_seq_length(self) -> int:
        return self._kv_cache.window.length - self._kv_cache.window.width

    def get_max_length(self) -> int:
        return self._kv_cache.capacity
