"""A model's decoder layers, found by its structure whatever they are called, and their compilation.

They are what FSDP2 gathers one at a time, and what ``torch.compile`` compiles: one graph serves all
layers, and neither the head nor the bookkeeping around a model is traced.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from sdp_lightning.errors import ConfigError


def decoder_layers(policy: nn.Module) -> dict[str, nn.Module]:
    """The items of the outermost lists of modules, by name: ``model.layers.0``, ``model.layers.1``.

    Single linear layers or embeddings in a list are no decoder layers.
    """
    layers: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in policy.named_modules():  # an outer module comes before its own
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(lists)):
            lists.append(f"{name}.")
            for number, item in module.named_children():
                if [*item.children()] and [*item.parameters()]:
                    layers[f"{name}.{number}"] = item
    return layers


def layers_to_shard(policy: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, none of which has a weight in common with the rest of the model.

    Raises:
        ConfigError: if one has; names the weight, both places and the strategy to use.
    """
    layers = decoder_layers(policy)
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        first, place = owners.setdefault(parameter, (owner, name))
        if first != owner:
            raise ConfigError(
                f"model type {policy.config.model_type!r} has one weight in two places, {place} "
                f"and {name}: FSDP2 gathers weights layer by layer, and cannot share one between "
                "layers. Use strategy='ddp'."
            )
    return list(layers.values())


def compile_layers(policy: nn.Module, compiler: Any) -> None:
    """Compile each decoder layer in place, or the whole of a model that has none; names stay.

    Args:
        policy: the model.
        compiler: what ``torch.compile`` makes of its options: ``dynamo_ctx`` of its results.
    """
    layers: list[Any] = [*decoder_layers(policy).values()] or [policy]
    for layer in layers:
        layer._compiled_call_impl = compiler(layer._call_impl)


def is_compiled(policy: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the model or a part of it."""
    modules: list[Any] = [*policy.modules()]
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in modules)


def refuse_wrapped(policy: nn.Module) -> None:
    """Raise a ConfigError if ``policy`` is a wrapper that ``torch.compile`` made."""
    if isinstance(policy, OptimizedModule):
        raise ConfigError(
            "policy = torch.compile(policy) renames all weights. Use policy.compile(), in place, "
            "or give torch.compile(module) to the Trainer."
        )
