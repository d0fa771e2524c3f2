"""Loading of the trained model, and selection of its trained parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdp_lightning.config import LoRAConfig
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import add_adapter
from sdp_lightning.training.policy.sharding import Source


def load_policy(model_id: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM ``model_id``, in float32 unless ``options`` say otherwise."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(model_id, **{"dtype": torch.float32, **options})


def load(
    model_id: str, options: Mapping[str, Any], *, sharded: bool, lora: LoRAConfig | None = None
) -> tuple[PreTrainedModel, Source]:
    """The model, with its adapter if it has one, and the weights that :func:`shard` fills it with.

    With ``sharded`` the model is on the meta device, and only rank 0 reads the weights.
    """
    if not sharded:
        return _with_adapter(load_policy(model_id, options), lora), None
    source: Source = None
    kind: list[Any] = [None]
    if distributed.get_rank() == 0:
        source = load_policy(model_id, options)
        kind = [(type(source), source.config, source.dtype)]
        source = _with_adapter(source, lora)  # at random, as in one process
    distributed.broadcast_object_list(kind, src=0)
    model_class, config, dtype = kind[0]
    with torch.device("meta"):
        model: Any = model_class(config).to(dtype)
    return _with_adapter(model, lora), source


def _with_adapter(model: PreTrainedModel, lora: LoRAConfig | None) -> PreTrainedModel:
    if lora is not None:
        add_adapter(model, lora)
    return model


def select_trainable(policy: nn.Module, pattern: str | None) -> None:
    """Freeze every parameter whose name ``pattern`` does not find."""
    if pattern is None:
        return
    names = [name for name, _ in policy.named_parameters() if re.search(pattern, name)]
    if not names:
        some = ", ".join([name for name, _ in policy.named_parameters()][:3])
        raise ConfigError(f"trainable={pattern!r} finds no parameter; names look like {some}.")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in names)


def disable_dropout(policy: nn.Module) -> None:
    """Turn dropout off in train mode: it would make every log-prob a random number."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0
