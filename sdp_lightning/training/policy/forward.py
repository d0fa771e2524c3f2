"""Log-probs of a batch's sampled tokens under a transformers causal LM.

The decoder runs without its language-model head; the head is applied, in chunks, only where a
sampled token is scored. Three layouts give the same numbers: ``"padded"`` is [B, T] as collated,
``"packed"`` lays rows one after another, ``"shared_prefix"`` does with a group's prompt there once.

Shapes: B rows, T tokens, N packed tokens, M sampled tokens, D hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdp_lightning.errors import ConfigError
from sdp_lightning.objective.token_logprobs import LogitTransform, token_logprobs
from sdp_lightning.training.batch import AttentionCosts, Batch, Layout
from sdp_lightning.training.policy.packing import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings by which some model types change their logits, and the value that changes nothing.
_LOGIT_TRANSFORMS = {
    "logits_soft_cap": None,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}
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
        layout: all but ``"padded"`` need full attention in every layer.
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
        pack = Pack.of(batch, shared=layout == "shared_prefix")
        hidden = _packed_hidden(model, batch, pack, layout)[pack.place(rows, columns - 1)]
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
        # foreign: model configurations differ
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise ConfigError(
                f"model type {kind!r} has {name}={value}: its logits are not those of its head, "
                "and scoring them as such would be wrong. Use a model without it."
            )
    _logit_transform(model)
    if layout == "padded":
        return
    # foreign: model configurations differ
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    # foreign: model configurations differ
    window = getattr(config, "sliding_window", None)
    # foreign: model configurations differ
    if layers != {"full_attention"} or (window is not None and not hasattr(config, "layer_types")):
        kinds = f"sliding_window={window}" if layers == {"full_attention"} else sorted(layers)
        raise ConfigError(
            f"model type {kind!r} has layers that are not full attention ({kinds}): rows cannot "
            f"be laid out as {layout!r}. Use layout='padded'."
        )
    attention = config._attn_implementation
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


def _logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Transform of the logits in Gemma 2 (a cap), Cohere (a factor) and Granite (a divisor)."""
    config: Any = model.config.get_text_config(decoder=True)
    # foreign: model configurations differ
    factor: float | None = getattr(config, "logit_scale", None)
    # foreign: model configurations differ
    divisor: float | None = getattr(config, "logits_scaling", None)
    # foreign: model configurations differ
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    scale = (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor or math.nan)
    try:
        return LogitTransform(scale, softcap)
    except ConfigError as error:
        raise ConfigError(
            f"model type {config.model_type!r} has logit_scale={factor}, logits_scaling={divisor}, "
            f"final_logit_softcapping={softcap}: {error}"
        ) from None


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


def _packed_hidden(model: PreTrainedModel, batch: Batch, pack: Pack, layout: Layout) -> Tensor:
    """[N, D]."""
    decoder = model.get_decoder()
    return decoder(
        input_ids=batch.input_ids[pack.row, pack.column][None],
        attention_mask=_packed_mask(decoder, pack, layout),
        position_ids=batch.position_ids[pack.row, pack.column][None],
        use_cache=False,  # with a cache transformers does not see that positions start again
    ).last_hidden_state[0]


def _packed_mask(decoder: Any, pack: Pack, layout: Layout) -> Tensor | None:
    """None where transformers keeps rows apart, by positions that start again."""
    attention = decoder.config._attn_implementation
    if attention == "sdpa" and pack.row.device.type == "cpu":
        return pack.span_mask()
    if layout == "packed":
        return None
    mask = pack.dense_mask()[None, None]
    if attention != "eager":
        return mask
    low = torch.finfo(decoder.dtype).min  # eager attention adds its mask
    return torch.zeros_like(mask, dtype=decoder.dtype).masked_fill(~mask, low)
