"""Export of the policy's weights to engines: whole, merged, under the model's own names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import (
    AdaptedWeight,
    adapted_weights,
    group_by_base_weight,
    is_adapter,
    merge,
)
from sdp_lightning.weights.protocol import WeightStream


def named_weights(
    policy: nn.Module, *, changed_only: bool, merged_alpha: float | None = None
) -> WeightStream:
    """Weights for an engine, under the names of the model's ``state_dict``.

    Sharded weights are gathered, and adapters merged into copies, one at a time: all ranks must
    iterate over the whole stream.

    Args:
        policy: the model.
        changed_only: the trained weights, with all else of their layers: servers fuse weights of a
            layer, and a fused one that comes in part is wrong.
        merged_alpha: lora_alpha with which the adapter is merged; None: there is no adapter, or it
            is exported as it is.

    Raises:
        ConfigError: if an adapter on experts would be exported as it is.
    """
    state, trained = (
        policy.state_dict(),
        [n for n, p in policy.named_parameters() if p.requires_grad],
    )
    adapted = adapted_weights(policy)
    if merged_alpha is not None:
        parts, trained = group_by_base_weight(state, adapted), list(adapted)
    else:
        _refuse_stacks(adapted)
        parts = {name: [tensor] for name, tensor in state.items()}
        trained += [name for name in state if is_adapter(name)]  # also the names of shared ones
    layers = {layer_of(name) for name in trained}
    layout = {
        name: _like(some)
        for name, some in parts.items()
        if not changed_only or layer_of(name) in layers
    }

    def whole(name: str) -> Tensor:
        transposed = name in adapted and adapted[name].transposed
        return merge([_whole(t) for t in parts[name]], merged_alpha or 0.0, transposed=transposed)

    return WeightStream(layout, whole)


def _refuse_stacks(adapted: Mapping[str, AdaptedWeight]) -> None:
    for name, adapter in adapted.items():
        if adapter.is_stack:
            raise ConfigError(
                f"the adapter lies on experts ({name}), and no server takes such adapters by "
                "themselves. Leave out transport='lora': other transports send merged weights."
            )


def _like(parts: list[Tensor]) -> Tensor:
    """The weight, or its shape and dtype on the meta device if it is sharded or has an adapter."""
    if len(parts) == 1 and not isinstance(parts[0], DTensor):
        return parts[0]
    return torch.empty(parts[0].shape, dtype=parts[0].dtype, device="meta")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def layer_of(name: str) -> str:
    """``model.layers.3`` for ``model.layers.3.mlp.up_proj.weight``; other names are unchanged."""
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return name if layer is None or ".lora_" in name else layer[0]
