"""What enters a model's language-model head, and what the model makes of the logits that leave it.

Both are observed in a forward pass of the whole model, in which a stand-in for the head keeps its
input and returns known numbers. So nothing is assumed of where the decoder ends or of names of
settings, and no table of logits is computed.

Shapes: B rows, T tokens, D hidden units, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.objective.token_logprobs import LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALL, _LARGE = 2.0**-7, 1e4  # logits that no cap bends, and that every cap does
_PROBE = (_SMALL, _LARGE, 0.0, -3.0, 0.5, 20.0, -0.1, -_LARGE, 150.0)
_TOLERANCE = 1e-5  # of a float32 result


@dataclass(frozen=True, eq=False)
class HeadInput:
    """What a model gives to its head.

    Args:
        hidden: [B, T, D].
        weight: [V, D] of the head, without the tokens whose logits the model cuts off.
        bias: [V] of the head, if it has one.
        transform: what the model does to its head's logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


def run_to_head(model: PreTrainedModel, **inputs: Any) -> HeadInput:
    """Run a causal LM without the product of its head.

    Args:
        model: a causal LM with a linear head.
        inputs: arguments of its forward.

    Raises:
        ConfigError: if the model does not call its head once, or if its logits are not a scaled
            and capped form of what the head gives; names the model type.
    """
    head: Any = model.get_output_embeddings()
    kind = model.config.get_text_config(decoder=True).model_type
    kept: list[Tensor] = []
    size = head.weight.shape[0]
    values = torch.tensor(_PROBE, dtype=torch.float32, device=head.weight.device)
    probe = values.repeat(size // len(_PROBE) + 1)[None, None, :size]

    def stand_in(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return probe

    own = vars(head).get("forward")
    head.forward = stand_in
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    if len(kept) != 1 or logits.dim() != 3 or logits.requires_grad:
        raise ConfigError(
            f"the logits of model type {kind!r} are not those of its head alone, so it cannot be "
            "scored. Use another model."
        )
    found = logits[0, 0].float()
    transform = _fit(probe[0, 0, : len(found)], found, kind)
    weight, bias = head.weight, head.bias
    if len(found) < size:
        weight, bias = weight[: len(found)], None if bias is None else bias[: len(found)]
    return HeadInput(kept[0], weight, bias, transform)


def _fit(given: Tensor, found: Tensor, kind: str) -> LogitTransform:
    """The scale and cap by which ``found`` [V] comes from ``given`` [V]."""
    if torch.equal(given, found):
        return LogitTransform()
    low, high = found[:2].double().tolist()
    transform, expected = LogitTransform(), given
    if 0 < low < math.inf and math.isclose(high * _SMALL, low * _LARGE, rel_tol=1e-3):
        transform = LogitTransform(low / _SMALL)
        expected = given * transform.scale
    elif 0 < low < high < math.inf:
        transform = LogitTransform(high * math.atanh(low / high) / _SMALL, high)
        expected = torch.tanh(given * (transform.scale / high)) * high
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * _SMALL):
        raise ConfigError(
            f"model type {kind!r} changes the logits of its head by more than a positive factor "
            "and a cap (c tanh(s l / c)), and scoring them as such would be wrong. Use another "
            "model."
        )
    return transform
