"""Rows of a batch one after another, without padding, and attention that keeps them apart.

Shapes: B rows, N packed tokens, M sampled tokens, H heads, D units of a head. A span is a run of
packed tokens that see nothing outside it: a row, or all of a group that shares its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from sdp_lightning.engines.attention_masks import CAUSAL, MaskRule, extend_masks
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Batch


@dataclass(frozen=True, eq=False)
class Pack:
    """Positions of a batch's tokens in the pack. A span is a group's prefix, then its rows' own.

    Args:
        row: [N] row in the batch; for a prefix, the first row of its group.
        column: [N] column in that row.
        group: [N] index of the span.
        block: [N] block index: below ``num_groups`` for a prefix, then one for each row.
        num_groups: number of spans, empty ones too.
        starts: [G + B] packed index of the first token of each block.
        prefixes: [B] length of the prefix of each row's group.
        groups: [B] span of each row.
    """

    row: Tensor
    column: Tensor
    group: Tensor
    block: Tensor
    num_groups: int
    starts: Tensor
    prefixes: Tensor
    groups: Tensor

    @classmethod
    def of(cls, batch: Batch, *, shared: bool) -> Pack:
        """Pack a batch. ``shared``: a group's prefix comes once; else each row is its own group."""
        used, rows = batch.scored_lengths, torch.arange(len(batch), device=batch.lengths.device)
        if not bool(used.any()):  # nothing to score: one token, for the graph
            used = used.index_fill(0, used.new_zeros(1), 1)
        prefixes = batch.prefix_lengths if shared else torch.zeros_like(used)
        ids, groups = torch.unique(batch.group_ids if shared else rows, return_inverse=True)
        count = ids.numel()
        prefix = used.new_zeros(count).scatter_reduce(0, groups, prefixes, "amax")
        first = used.new_full((count,), len(batch)).scatter_reduce(0, groups, rows, "amin")
        lengths = torch.cat([prefix, (used - prefixes).clamp(min=0)])
        owners = torch.cat([torch.arange(count, device=used.device), groups])
        order = owners.argsort(stable=True)  # a prefix comes before the rows of its group
        starts = torch.empty_like(lengths)
        starts[order] = lengths[order].cumsum(0) - lengths[order]
        block = torch.repeat_interleave(order, lengths[order])
        offset = torch.arange(block.numel(), device=used.device) - starts[block]
        row = torch.cat([first, rows])[block]
        return cls(
            row=row,
            column=torch.where(block < count, offset, offset + prefixes[row]),
            group=owners[block],
            block=block,
            num_groups=count,
            starts=starts,
            prefixes=prefixes,
            groups=groups,
        )

    def place(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[M] packed indices of tokens of the batch."""
        prefix = self.prefixes[rows]
        in_prefix = self.starts[self.groups[rows]] + columns
        in_remainder = self.starts[self.num_groups + rows] + columns - prefix
        return torch.where(columns < prefix, in_prefix, in_remainder)

    def dense_mask(self, rule: MaskRule = CAUSAL) -> Tensor:
        """[N, N] bool: a token sees its group's prefix and its own row, up to itself.

        Args:
            rule: what a layer lets a token see in a row on its own.
        """
        return self._visible(slice(None), rule)

    def span_mask(self, rule: MaskRule = CAUSAL) -> SpanMask:
        """The same mask, stored only inside the spans."""
        spans: list[_Span] = []
        start = 0
        lengths: list[int] = torch.bincount(self.group).tolist()
        for length in filter(None, lengths):
            inside = slice(start, start + length)
            blocks = self.block[inside]
            visible = None
            if rule is not CAUSAL or bool((blocks[:1] != blocks).any()):
                visible = self._visible(inside, rule)
                if int(visible.sum()) == length * (length + 1) // 2:
                    visible = None
            spans.append(_Span(inside, visible))
            start += length
        return SpanMask.of(spans, self.block.numel())

    def _visible(self, inside: slice, rule: MaskRule) -> Tensor:
        group, block, column = self.group[inside], self.block[inside], self.column[inside]
        reachable = (block < self.num_groups) | (block[:, None] == block)
        first = column.new_zeros(1, 1, 1, 1)  # row and head
        seen = rule(first, first, column[None, None, :, None], column[None, None, None])[0, 0]
        causal = column[:, None] >= column
        return (group[:, None] == group) & reachable & causal & seen


@dataclass(frozen=True, eq=False)
class _Span:
    """Packed indices, and the mask among them; None is causal."""

    inside: slice
    visible: Tensor | None


# Functions that return a mask as it is, maybe of another type.
_FORMS = {
    *(Tensor.to, Tensor.view, Tensor.reshape, Tensor.contiguous, Tensor.clone, Tensor.detach),
    *(Tensor.bool, Tensor.long, Tensor.int, Tensor.float, Tensor.type, Tensor.type_as),
}


class PackMask(Tensor):
    """A mask [1, N] of ones, of which a model makes the mask of each of its kinds of layer.

    transformers' functions for masks (causal, windows, chunks) take it in place of a mask of
    padding, and their rules are applied to the columns of each row: see :func:`pack_mask`.
    """

    pack: Pack

    @classmethod
    def of(cls, pack: Pack) -> PackMask:
        """The mask of all tokens of a pack."""
        ones = torch.ones_like(pack.row, dtype=torch.bool)[None]
        mask: Any = torch.Tensor._make_subclass(cls, ones)  # pyright: ignore[reportPrivateUsage]
        mask.pack = pack
        return mask

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            found = func(*args, **(kwargs or {}))
        if func in _FORMS and found.shape == args[0].shape:
            found = torch.Tensor._make_subclass(cls, found)  # pyright: ignore[reportPrivateUsage]
            found.pack = args[0].pack
        return found


def pack_mask(*, attention_mask: Any, mask_function: MaskRule, **options: Any) -> Tensor | None:
    """A pack's mask for one kind of layer, or None if ``attention_mask`` is of no pack.

    ``scaled_dot_product_attention`` on a CPU attends by spans; not to a single token, whose heads
    transformers 5.24 lays out where the tokens of others are.
    """
    if not isinstance(attention_mask, PackMask):
        return None
    pack = attention_mask.pack
    by_spans = options["config"]._attn_implementation == "sdpa" and len(pack.row) > 1
    if by_spans and pack.row.device.type == "cpu":
        return pack.span_mask(mask_function)
    return pack.dense_mask(mask_function)[None, None]


extend_masks(pack_mask)


class SpanMask(Tensor):
    """A mask [1, 1, N, N] of which only the spans on its diagonal exist.

    ``scaled_dot_product_attention`` attends span by span when it is given one, so that neither N^2
    pairs nor their mask are computed. Any other function that reads the mask is given all of it.
    """

    spans: Sequence[_Span]

    @classmethod
    def of(cls, spans: Sequence[_Span], size: int) -> SpanMask:
        """``size`` is N."""
        nothing = torch.zeros((), dtype=torch.bool).expand(1, 1, size, size)
        mask: Any = torch.Tensor._make_subclass(cls, nothing)  # pyright: ignore[reportPrivateUsage]
        mask.spans = spans
        return mask

    def dense(self) -> Tensor:
        """[1, 1, N, N] bool."""
        blocks: list[Tensor] = []
        for span in self.spans:
            size = span.inside.stop - span.inside.start
            causal = torch.ones(size, size, dtype=torch.bool).tril()
            blocks.append(causal if span.visible is None else span.visible)
        return torch.block_diag(*blocks)[None, None]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func.__name__ in ("__get__", "dim", "size", "is_floating_point"):  # what kind it is
            return super().__torch_function__(func, types, args, kwargs or {})
        if func.__name__ == "__setitem__" or func.__name__.removesuffix("__")[-1:] == "_":
            raise ConfigError(
                f"this model changes its attention mask ({func.__name__}), so rows cannot be "
                "packed. Use layout='padded'."
            )
        return func(
            *tree_map_only(SpanMask, SpanMask.dense, args),
            **tree_map_only(SpanMask, SpanMask.dense, dict(kwargs or {})),
        )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: SpanMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """[1, H, N, D] ``scaled_dot_product_attention`` within each span."""
    del is_causal  # every span is causal, by itself or by its mask
    parts: list[Tensor] = []
    for span in attn_mask.spans:
        q, k, v = (tensor[:, :, span.inside] for tensor in (query, key, value))
        causal = span.visible is None
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=span.visible, dropout_p=dropout_p, is_causal=causal, **options
        )
        parts.append(attended)
    return torch.cat(parts, dim=2)
