"""Loading of the trained model, and selection of its trained parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdp_lightning.config import LoRAConfig
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import beside_text, import_code, load_causal_lm
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import add_adapter
from sdp_lightning.training.policy.lora_checkpoint import AdapterRecord, base_of
from sdp_lightning.training.policy.rotary import rotate_rows_alone
from sdp_lightning.training.policy.sharding import Source

logger = logging.getLogger(__name__)


def load_policy(model: ModelSource, options: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM of ``model``, in float32 unless ``options`` say otherwise.

    Weights that no text passes through are frozen.
    """
    policy = load_causal_lm(model, dtype=torch.float32, options=options)
    if frozen := beside_text(policy):
        logger.info(
            "%s is trained on text: %d of its %d weights, such as %s, are of other parts and stay "
            "as they are.",
            model.name,
            len(frozen),
            len(list(policy.parameters())),
            min(frozen),
        )
    return policy


@dataclass(frozen=True)
class Loaded:
    """A loaded model, with its adapter if it has one.

    Args:
        policy: the model.
        source: the weights that :func:`~sdp_lightning.training.policy.sharding.shard` fills it
            with, on rank 0.
        adapter: what a checkpoint says of the adapter.
    """

    policy: PreTrainedModel
    source: Source = None
    adapter: AdapterRecord | None = None


def load(
    model: ModelSource,
    options: Mapping[str, Any],
    *,
    sharded: bool,
    lora: LoRAConfig | None = None,
) -> Loaded:
    """The model.

    With ``sharded`` it is on the meta device, and only rank 0 reads the weights.
    """
    if not sharded:
        policy = load_policy(model, options)
        return Loaded(policy, adapter=_adapt(policy, lora, model))
    source: Source = None
    kind: list[Any] = [None]
    if distributed.get_rank() == 0:
        source = load_policy(model, options)
        own = type(source), source.config, source.dtype
        kind = [(*own, _adapt(source, lora, model))]  # at random, as in one process
    elif model.trust_remote_code:
        import_code(model)  # of the class that rank 0 sends
    distributed.broadcast_object_list(kind, src=0)
    model_class, config, dtype, adapter = kind[0]
    with torch.device("meta"):
        empty: Any = model_class(config).to(dtype)
    if lora is not None:
        add_adapter(empty, lora, adapter.targets)
    return Loaded(empty, source, adapter)


def _adapt(
    policy: PreTrainedModel, lora: LoRAConfig | None, model: ModelSource
) -> AdapterRecord | None:
    """Put the adapter on a model that holds its weights."""
    if lora is None:
        return None
    base = base_of(policy, str(model.name), model.revision)
    return AdapterRecord(lora, add_adapter(policy, lora), base)


def prepare(policy: PreTrainedModel, *, recompute: bool) -> None:
    """Let ``policy`` compute as scores are checked: without noise, each row by its own length.

    Args:
        policy: the model, with its trained weights chosen.
        recompute: recompute activations in the backward pass.

    Raises:
        ConfigError: if trained weights are in half precision, or activations cannot be recomputed.
    """
    refuse_half_precision(policy)
    rotate_rows_alone(policy)
    if recompute:
        recompute_activations(policy)
    disable_noise(policy)


def select_trainable(policy: nn.Module, pattern: str | None) -> None:
    """Freeze every parameter whose name ``pattern`` does not find, or that no text passes."""
    beside = beside_text(policy)
    for name in beside:
        policy.get_parameter(name).requires_grad_(False)
    if pattern is None:
        return
    text = [name for name, _ in policy.named_parameters() if name not in beside]
    names = {name for name in text if re.search(pattern, name)}
    if not names:
        some = ", ".join(text[:3])
        raise ConfigError(f"trainable={pattern!r} finds no parameter; names look like {some}.")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in names)


def refuse_half_precision(policy: nn.Module) -> None:
    """Refuse trained weights in half precision, which the steps of AdamW leave as they are.

    bfloat16 has 8 significant bits: a step below 0.2 % of a weight is rounded away. An adapter is
    in float32 over a base model in bfloat16, so that one can be trained.

    Raises:
        ConfigError: naming a weight, its type and the remedy.
    """
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"the trained weights are in {kind} ({name}): it rounds the steps of an optimizer "
                "away. Leave dtype out of model_kwargs, so that weights are in float32, and give "
                "the Trainer precision='bf16-mixed' to compute in bfloat16; or train an adapter, "
                "lora=LoRAConfig(), which is in float32 over a base model of any dtype."
            )


def disable_noise(policy: nn.Module) -> None:
    """Put a policy in eval mode, also while it trains: gradients do not depend on the mode.

    Dropout, jitter and routers that sample would make every log-prob a random number. Whatever a
    model calls them, they act in train mode only. Layers that recompute their activations do that
    in train mode only, so they keep it; :func:`recompute_activations` has their forward in eval
    mode, too.
    """
    policy.eval()
    for layer in _recomputing_layers(policy):
        layer.training = True


def recompute_activations(policy: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, with every layer's forward in eval mode.

    Raises:
        ConfigError: if the model has no such thing; names its type.
    """
    # foreign: transformers 5.24 renamed the method, and warns of its former name
    enable = getattr(policy, "activation_checkpointing_enable", None)
    try:
        (enable or policy.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"model type {policy.config.model_type!r} cannot recompute activations ({error}). Use "
            "gradient_checkpointing=False; a lower update.max_tokens_per_microbatch saves memory."
        ) from error
    policy.disable_input_require_grads()  # frozen layers need no graph
    for layer in _recomputing_layers(policy):
        run: Any = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = partial(_checkpoint_in_eval_mode, layer, run)


def _recomputing_layers(policy: nn.Module) -> list[Any]:
    # foreign: modules of transformers have this flag, or do not
    flagged = [m for m in policy.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [module for module in flagged if isinstance(module, GradientCheckpointingLayer)]
    return layers or flagged  # a model of remote code may checkpoint in its decoder


def _checkpoint_in_eval_mode(layer: nn.Module, checkpoint: Any, forward: Any, *args: Any) -> Any:
    def in_eval_mode(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *args)
