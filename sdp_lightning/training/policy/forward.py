"""Log-probs of a batch's sampled tokens under a transformers causal LM.

The model runs without its language-model head; the head is applied, in chunks, only where a
sampled token is scored. Three layouts give the same numbers: ``"padded"`` is [B, T] as collated,
``"packed"`` lays rows one after another, ``"shared_prefix"`` does with a group's prompt there once.

Shapes: B rows, T tokens, N packed tokens, M sampled tokens, D hidden units.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sdp_lightning.config.model_limits import stateful_layers
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.objective.token_logprobs import token_logprobs
from sdp_lightning.training.batch import AttentionCosts, Batch, Layout
from sdp_lightning.training.policy.head import HeadInput, run_to_head
from sdp_lightning.training.policy.layers import is_compiled
from sdp_lightning.training.policy.packing import Pack, PackMask
from sdp_lightning.training.policy.rotary import rotaries_by_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Cost of an attention call, forward and backward on a CPU, in tokens times D. With it "auto" takes
# the fastest layout in all cases of recipes/benchmarks/speed/packing.py.
_SPAN_COST = 6000.0


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
    model: PreTrainedModel,
    batch: Batch,
    *,
    layout: Layout = "padded",
    chunk_size: int = 512,
    num_tokens: int | None = None,
) -> SequenceLogprobs:
    """Score the loss-mask tokens of a batch under a model.

    Frozen layers below the first trained one keep nothing for backward, unless the model was told
    to ``enable_input_require_grads``. ``gradient_checkpointing_enable`` does that unasked, and
    checkpointing without re-entry does not need it: undo it. Without any loss token the decoder
    runs over one token, and the result is 0 with a graph to every trained parameter.

    Args:
        model: a causal LM with a linear head.
        batch: on the model's device.
        layout: all but ``"padded"`` need layers that mix tokens by masked attention alone.
        chunk_size: tokens whose logits exist at once.
        num_tokens: token ids from this one on are never sampled; None: all may be.

    Raises:
        ConfigError: if the model does more to its logits than to scale and cap them, or cannot
            attend in this layout; names the model type.
        RolloutError: if a token is scored that is never sampled.
    """
    check_model(model, layout)
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    if layout == "padded":
        found = _padded_hidden(model, batch)
        hidden = found.hidden[rows, columns - 1]
    else:
        pack = Pack.of(batch, shared=layout == "shared_prefix")
        found = _packed_hidden(model, batch, pack)
        hidden = found.hidden[0, pack.place(rows, columns - 1)]
    _require_text(batch.input_ids[rows, columns], num_tokens)
    logprobs, entropy = token_logprobs(
        hidden,
        found.weight,
        batch.input_ids[rows, columns],
        batch.temperatures[rows, columns],
        bias=found.bias,
        chunk_size=chunk_size,
        transform=found.transform,
        num_tokens=num_tokens,
    )
    empty = logprobs.new_zeros(batch.loss_mask.shape)
    return SequenceLogprobs(
        logprobs=empty.index_put((rows, columns), logprobs),
        entropy=empty.index_put((rows, columns), entropy),
    )


def _require_text(targets: Tensor, num_tokens: int | None) -> None:
    largest = -1 if num_tokens is None or not targets.numel() else int(targets.max())
    if num_tokens is not None and largest >= num_tokens:
        raise RolloutError(
            f"token {largest} was sampled, and the tokenizer has no text for those from "
            f"{num_tokens} on, so that its probability is 0: leave out the groups of a recording, "
            "or of a checkpoint, that hold it."
        )


class LogprobForward(nn.Module):
    """:func:`sequence_logprobs` as a module: FSDP gathers the weights of what is called.

    Args:
        policy: the model.
        num_tokens: token ids from this one on are never sampled; None: all may be.
    """

    def __init__(self, policy: PreTrainedModel, num_tokens: int | None = None) -> None:
        super().__init__()
        self.policy, self.num_tokens = policy, num_tokens

    def forward(self, batch: Batch, layout: Layout | Literal["alone"]) -> tuple[Tensor, Tensor]:
        """[B, T] log-probs and entropy, as a plain tuple, in which FSDP looks for tensors.

        ``"alone"`` is :func:`own_logprobs`, and what its head returned in place of the entropy.
        """
        if layout == "alone":
            return own_logprobs(self.policy, batch, self.num_tokens)
        result = sequence_logprobs(self.policy, batch, layout=layout, num_tokens=self.num_tokens)
        return result.logprobs, result.entropy

    @contextmanager
    def whole_vocabulary(self) -> Generator[None]:
        """Context in which scores are of the whole vocabulary, as an engine's of a prompt are."""
        num_tokens, self.num_tokens = self.num_tokens, None
        try:
            yield
        finally:
            self.num_tokens = num_tokens


def own_logprobs(
    model: PreTrainedModel, batch: Batch, num_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Score the loss-mask tokens by the model's own logits, each row alone and without padding.

    Returns:
        [B, T] log-probs at each token's temperature, 0 outside the loss mask, and the last row's
        [1, T', V] as the head returned it.
    """
    head: Any = model.get_output_embeddings()
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        kept[:] = [output]

    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    result = torch.zeros_like(batch.temperatures)
    with head.register_forward_hook(keep):
        for row, used in enumerate(batch.scored_lengths.tolist()):
            (columns,) = batch.loss_mask[row].nonzero(as_tuple=True)
            ids = batch.input_ids[row : row + 1, :used]
            some: Any = {"logits_to_keep": columns - 1} if selects else {}
            logits = model(input_ids=ids, use_cache=False, **some).logits[0].float()
            logits = logits if selects else logits[columns - 1]
            logits = logits[:, :num_tokens]
            table = (logits / batch.temperatures[row, columns, None]).log_softmax(-1)
            result[row, columns] = table.gather(1, batch.input_ids[row, columns, None])[:, 0]
    return result, kept[-1]


def check_model(model: PreTrainedModel, layout: Layout) -> None:
    """Refuse a model whose log-probs would come out wrong, from what its configuration says.

    Raises:
        ConfigError: naming the model type, the setting and the remedy.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kind = config.model_type
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model type {kind!r} has no language-model head. Load a causal LM.")
    if layout == "padded":
        return
    if any(rotaries_by_length(model)):
        raise ConfigError(
            f"model type {kind!r} takes its rotary positions from a row's length, and rows that "
            f"are laid out as {layout!r} have one in common. Use layout='padded'."
        )
    if other := stateful_layers(config):
        raise ConfigError(
            f"model type {kind!r} has layers that are not attention ({', '.join(other)}): rows "
            f"cannot be laid out as {layout!r}. Use layout='padded'."
        )
    attention = config._attn_implementation
    if attention == "sdpa" and model.device.type == "cpu" and is_compiled(model):
        raise ConfigError(
            f"model type {kind!r} is compiled, and on a CPU its attention among packed rows cannot "
            f"be: rows cannot be laid out as {layout!r}. Use layout='padded'."
        )
    if attention in ("sdpa", "eager") or (layout == "packed" and attention.startswith("flash_")):
        return
    lack = "does not keep packed rows apart" if layout == "packed" else "takes no mask of its own"
    raise ConfigError(
        f"model type {kind!r} runs with attention {attention!r}, which {lack}. "
        "Use attn_implementation='sdpa', or layout='padded'."
    )


def attention_costs(model: PreTrainedModel) -> AttentionCosts:
    """Costs of attention in this model on its present device."""
    config: Any = model.config.get_text_config(decoder=True)
    attention: str = config._attn_implementation
    on_cpu = model.device.type == "cpu"
    return AttentionCosts(
        pair=1 / (6 * config.hidden_size),  # with D units a layer takes 24 D^2 a token, 4 D a pair
        span=_SPAN_COST / config.hidden_size if on_cpu else 0.0,
        by_span=(on_cpu and attention == "sdpa") or attention.startswith("flash_"),
    )


def _padded_hidden(model: PreTrainedModel, batch: Batch) -> HeadInput:
    """Hidden units are [B, T', D] with T' the longest row that has to be computed."""
    used = batch.scored_lengths.clamp(min=1)
    width = int(used.max())
    index = torch.arange(width, device=used.device)
    positions = batch.position_ids[:, :width]
    return run_to_head(
        model,
        input_ids=batch.input_ids[:, :width],
        attention_mask=(index < used[:, None]).long(),
        position_ids=torch.minimum(positions, used[:, None] - 1),  # of padding, the row's last
    )


def _packed_hidden(model: PreTrainedModel, batch: Batch, pack: Pack) -> HeadInput:
    """Hidden units are [1, N, D]."""
    config: Any = model.config.get_text_config(decoder=True)
    by_position = config._attn_implementation.startswith("flash_")  # where positions start again
    return run_to_head(  # with a cache transformers does not see that positions start again
        model,
        input_ids=batch.input_ids[pack.row, pack.column][None],
        attention_mask=None if by_position else PackMask.of(pack),
        position_ids=batch.position_ids[pack.row, pack.column][None],
    )
