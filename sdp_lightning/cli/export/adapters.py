"""LoRA adapters of checkpoints: placed on an empty model, merged into the base model, or alone.

A checkpoint of a LoRA run holds the adapter only; to merge it, the base model is read as the run
read it, whole into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_lightning.cli.export.checkpoints import Checkpoint, MergedCheckpoint
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import auto_classes, load_causal_lm, load_config
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import (
    adapted_weights,
    add_adapter,
    is_adapter,
    merged_name,
    placed_by_peft,
)
from sdp_lightning.training.policy.lora_checkpoint import SavedAdapter, base_of
from sdp_lightning.training.policy.lora_targets import Targets
from sdp_lightning.weights.lora import adapter_config


def empty_model(
    base: ModelSource, dtype: torch.dtype = torch.float32, *, names: Iterable[str] = ()
) -> Any:
    """The model on the meta device, without memory for its weights.

    Args:
        base: resolved.
        dtype: dtype of its weights.
        names: names of weights, by which one of the model classes that load ``base`` is chosen.
    """
    wanted, models = set(names), list[Any]()
    try:
        for auto in auto_classes(load_config(base)):
            config = load_config(base)
            vars(config).pop("quantization_config", None)  # the trained weights are not quantized
            with torch.device("meta"):
                trust = base.trust_remote_code
                models.append(auto.from_config(config, dtype=dtype, trust_remote_code=trust))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal LM's config in {str(base.name)!r}: {error}") from error
    return max(models, key=lambda model: len(wanted & model.state_dict().keys()))


def adapted_model(checkpoint: Checkpoint, path: Path, base: ModelSource) -> Any:
    """The empty model ``base``, with the checkpoint's adapter if it has one.

    Raises:
        ConfigError: if the adapter's settings are unknown, or it is not one of this model.
    """
    names = {name for name in checkpoint.layout if is_adapter(name)}
    model = empty_model(base, names={*checkpoint.layout, *map(merged_name, names)})
    if not names:
        return model
    saved = checkpoint.adapter
    if saved is None:
        raise ConfigError(
            f"{path} holds {len(names)} LoRA weights of its policy, but not with which alpha they "
            "were trained: it was not written by SegmentWisePPOModule(lora=...)."
        )
    targets = saved.targets or Targets(
        tuple(dict.fromkeys(merged_name(name).removesuffix(".weight") for name in sorted(names)))
    )
    have = {name for name, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    wrong = [name for name in (*targets.layers, *targets.stacks) if name not in have]
    if not wrong:
        add_adapter(model, saved.config, targets)
        own = {n: t.shape for n, t in model.state_dict().items() if is_adapter(n)}
        wrong = [n for n in sorted(names | own.keys()) if n not in names or n not in own]
        wrong = wrong or [n for n in own if own[n] != checkpoint.layout[n].shape]
    if wrong:
        raise ConfigError(
            f"the adapter in {path} is not one of {base.name}: {wrong[0]} ({len(wrong)} in all) is "
            "not the same in both. Pass the model that was trained as --model."
        )
    return model


def merge_checkpoint(checkpoint: Checkpoint, adapted: Any, base: ModelSource) -> Checkpoint:
    """The checkpoint with its adapter merged, into its own weights or those of ``base``.

    Args:
        checkpoint: the checkpoint.
        adapted: :func:`adapted_model` of it.
        base: the base model.

    Raises:
        ConfigError: if ``base`` is not the model that the adapter was trained over.
    """
    saved = checkpoint.adapter
    weights: Mapping[str, Tensor] = {}
    if saved is not None and saved.base is not None:
        if base.revision is None and str(base.name) == saved.base.model:
            folder = Path(base.name).is_dir()
            base = base if folder else replace(base, revision=saved.base.revision)
        model = load_causal_lm(base, dtype=getattr(torch, saved.base.dtype), options={})
        saved.base.require(base_of(model, str(base.name)))
        weights = model.state_dict()
    return MergedCheckpoint(checkpoint, adapted_weights(adapted), weights)


def peft_settings(
    saved: SavedAdapter, adapted: Any, adapter: Mapping[str, Tensor], base: ModelSource
) -> dict[str, object]:
    """The ``adapter_config.json`` by which ``peft`` places the adapter where it was trained.

    ``peft`` rewrites targets of some model types, so each form of the settings is tried.

    Args:
        saved: the adapter's settings.
        adapted: :func:`adapted_model` of the checkpoint.
        adapter: weights by their names in the checkpoint.
        base: the base model.

    Raises:
        ConfigError: if no form does.
    """
    usual = adapter_config(dict(adapter), saved.config.alpha, rank=saved.config.rank)
    expected = {name: tensor.shape for name, tensor in adapter.items()}
    weights = set(map(merged_name, adapter))
    for form in _forms(usual, adapted):
        if expected == placed_by_peft(empty_model(base, names=weights), form):
            return form
    raise ConfigError(
        "peft would not place this adapter where it was trained, whatever its settings say. "
        "Export it merged: leave out --adapter."
    )


def _forms(usual: dict[str, object], adapted: Any) -> Iterator[dict[str, object]]:
    """Settings that name the places by last names, by whole names, and by parameters."""
    weights = adapted_weights(adapted)
    stacks = [name for name in weights if weights[name].is_stack]
    layers = [name.removesuffix(".weight") for name in weights if name not in stacks]
    rest: dict[str, object] = {"target_parameters": stacks} if stacks else {}
    if any(weights[f"{name}.weight"].transposed for name in layers):
        rest["fan_in_fan_out"] = True
    last = sorted({name.rpartition(".")[2] for name in layers})
    yield {**usual, **rest, "target_modules": last}
    yield {**usual, **rest, "target_modules": layers}
    yield {**usual, "target_modules": [], "target_parameters": list(weights)}
