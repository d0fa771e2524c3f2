"""Log-probs of a batch's sampled tokens under a transformers causal LM.

The decoder runs without its language-model head; the head is applied, in chunks, only where a
sampled token is scored. Two layouts give the same numbers: ``"padded"`` is [B, T] as collated,
``"shared_prefix"`` computes the prompt of a group once and packs every row's own tokens after it.

Shapes: B rows, T tokens, N packed tokens, M sampled tokens, D hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdp_lightning.batch import Batch, Layout
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective.logprobs import LogitTransform, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What some model types do to their logits after the head, and the value that leaves them alone.
_LOGIT_TRANSFORMS = {
    "logits_soft_cap": None,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}


@dataclass(frozen=True, eq=False)
class SequenceLogprobs:
    """Per-token results of a forward.

    Args:
        logprobs: [B, T] nats, at least float32, at each token's temperature.
        entropy: [B, T] nats, of the distribution that scored the token; detached.

    Both are 0 outside the loss mask.
    """

    logprobs: Tensor
    entropy: Tensor


def sequence_logprobs(
    model: PreTrainedModel, batch: Batch, *, layout: Layout = "padded", chunk_size: int = 512
) -> SequenceLogprobs:
    """Score the loss-mask tokens of a batch under a model.

    Frozen layers below the first trained one keep nothing for backward, unless the model was told
    to ``enable_input_require_grads``. ``gradient_checkpointing_enable`` does that unasked, and
    checkpointing without re-entry does not need it: undo it. Without any loss token the decoder
    runs over one token, and the result is 0 with a graph to every trained parameter.

    Args:
        model: a decoder with a linear head, ``get_decoder`` and ``get_output_embeddings``.
        batch: on the model's device.
        layout: ``"shared_prefix"`` needs full attention in every layer.
        chunk_size: tokens whose logits exist at once.

    Raises:
        ConfigError: if the model scales or caps its logits, or cannot attend in this layout; names
            the model type.
    """
    check_model(model, layout)
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    if layout == "padded":
        hidden = _padded_hidden(model, batch)[rows, columns - 1]
    else:
        pack = _Pack.of(batch)
        hidden = _packed_hidden(model, batch, pack)[pack.place(rows, columns - 1)]
    head: Any = model.get_output_embeddings()
    logprobs, entropy = token_logprobs(
        hidden,
        head.weight,
        batch.input_ids[rows, columns],
        batch.temperatures[rows, columns],
        bias=head.bias,
        chunk_size=chunk_size,
        transform=_logit_transform(model),
    )
    empty = logprobs.new_zeros(batch.loss_mask.shape)
    return SequenceLogprobs(
        logprobs=empty.index_put((rows, columns), logprobs),
        entropy=empty.index_put((rows, columns), entropy),
    )


class LogprobForward(nn.Module):
    """:func:`sequence_logprobs` as a module: FSDP gathers the weights of what is called.

    Args:
        policy: the model.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
        """[B, T] log-probs and entropy, as a plain tuple, in which FSDP looks for tensors."""
        result = sequence_logprobs(self.policy, batch, layout=layout)
        return result.logprobs, result.entropy


def check_model(model: PreTrainedModel, layout: Layout) -> None:
    """Refuse a model whose log-probs would come out wrong, from what its configuration says.

    Raises:
        ConfigError: naming the model type, the setting and the remedy.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kind = config.model_type
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model type {kind!r} has no language-model head. Load a causal LM.")
    for name, neutral in _LOGIT_TRANSFORMS.items():
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise ConfigError(
                f"model type {kind!r} has {name}={value}: its logits are not those of its head, "
                "and scoring them as such would be wrong. Use a model without it."
            )
    if layout == "padded":
        return
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if layers != {"full_attention"} or (window is not None and not hasattr(config, "layer_types")):
        found = f"sliding_window={window}" if layers == {"full_attention"} else sorted(layers)
        raise ConfigError(
            f"model type {kind!r} has layers that are not full attention ({found}): rows cannot "
            "share a prefix. Use layout='padded'."
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"model type {kind!r} runs with attention {config._attn_implementation!r}, which takes "
            "no mask of its own. Use attn_implementation='sdpa', or layout='padded'."
        )


def _logit_transform(model: PreTrainedModel) -> LogitTransform:
    """As Gemma 2 (a cap), Cohere (a factor) and Granite (a divisor) have it."""
    config: Any = model.config.get_text_config(decoder=True)
    factor: float = getattr(config, "logit_scale", None) or 1.0
    divisor: float = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(factor / divisor, getattr(config, "final_logit_softcapping", None))


def _padded_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, T', D] with T' the longest row that has to be computed."""
    used = batch.scored_lengths.clamp(min=1)
    width = int(used.max())
    index = torch.arange(width, device=used.device)
    return model.get_decoder()(
        input_ids=batch.input_ids[:, :width],
        attention_mask=(index < used[:, None]).long(),
        position_ids=batch.position_ids[:, :width],
        use_cache=False,
    ).last_hidden_state


def _packed_hidden(model: PreTrainedModel, batch: Batch, pack: _Pack) -> Tensor:
    """[N, D]."""
    mask = pack.attention()[None, None]
    decoder = model.get_decoder()
    config: Any = decoder.config
    if config._attn_implementation == "eager":  # adds its mask instead of choosing by it
        low = torch.finfo(decoder.dtype).min
        mask = torch.zeros_like(mask, dtype=decoder.dtype).masked_fill(~mask, low)
    return decoder(
        input_ids=batch.input_ids[pack.row, pack.column][None],
        attention_mask=mask,
        position_ids=batch.position_ids[pack.row, pack.column][None],
        use_cache=False,
    ).last_hidden_state[0]


@dataclass(frozen=True, eq=False)
class _Pack:
    """Where the tokens of a batch lie when every group's prefix is computed once.

    First all prefixes, then all remainders: G + B blocks, some of them empty.

    Args:
        row: [N] of the batch; for a prefix, the first row of its group.
        column: [N].
        group: [N].
        block: [N], below G for a prefix.
        num_groups: G.
        starts: [G + B] first packed place of each block.
        prefixes: [B] length of the prefix of each row's group.
        groups: [B].
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
    def of(cls, batch: Batch) -> _Pack:
        used, prefixes = batch.scored_lengths, batch.prefix_lengths
        if not bool(used.any()):
            used = used.index_fill(
                0, used.new_zeros(1), 1
            )  # nothing to score: one token, for the graph
        ids, groups = torch.unique(batch.group_ids, return_inverse=True)
        count = ids.numel()
        rows = torch.arange(len(batch), device=used.device)
        shared = used.new_zeros(count).scatter_reduce(0, groups, prefixes, "amax")
        first = used.new_full((count,), len(batch)).scatter_reduce(0, groups, rows, "amin")
        lengths = torch.cat([shared, (used - prefixes).clamp(min=0)])
        starts = lengths.cumsum(0) - lengths
        block = torch.repeat_interleave(lengths)
        offset = torch.arange(block.numel(), device=used.device) - starts[block]
        row = torch.cat([first, rows])[block]
        return cls(
            row=row,
            column=torch.where(block < count, offset, offset + prefixes[row]),
            group=groups[row],
            block=block,
            num_groups=count,
            starts=starts,
            prefixes=prefixes,
            groups=groups,
        )

    def attention(self) -> Tensor:
        """[N, N] bool: a token sees its group's prefix and its own row, up to itself."""
        shared = self.block < self.num_groups
        same_group = self.group[:, None] == self.group
        reachable = shared | (self.block[:, None] == self.block)
        return same_group & reachable & (self.column[:, None] >= self.column)

    def place(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[M] packed places of tokens of the batch."""
        prefix = self.prefixes[rows]
        in_prefix = self.starts[self.groups[rows]] + columns
        in_remainder = self.starts[self.num_groups + rows] + columns - prefix
        return torch.where(columns < prefix, in_prefix, in_remainder)
