"""LoRA adapters: added to a model by ``peft``, switched off, and merged one weight at a time.

``peft`` puts its layers into the model itself, which stays the class it was. A linear layer
``P.weight`` is then called ``P.base_layer.weight``, beside ``P.lora_A.default.weight`` [r, in] and
``P.lora_B.default.weight`` [out, r].
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdp_lightning.config import LoRAConfig
from sdp_lightning.config.pretrained import beside_text
from sdp_lightning.errors import ConfigError

T = TypeVar("T")
LORA_KEY = "sdp_lora"  # where a checkpoint says what adapter it holds
_ADAPTER = re.compile(r"\.lora_(A|B)\.[^.]+(?=\.weight$)")


def add_adapter(model: Any, config: LoRAConfig) -> None:
    """Freeze ``model``, a transformers causal LM, and put a trainable adapter on it.

    The adapter is in float32 if the model is in half precision, as an optimizer needs it.

    Raises:
        ConfigError: if ``peft`` is missing, or ``config`` names what is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "lora= needs the package peft, which is not installed: pip install "
            f"'sdp-lightning[lora]' ({error})."
        ) from error
    names = _targets(model, config.target_modules)
    settings: Any = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": names}
    inject_adapter_in_model(LoraConfig(**settings), model)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


@contextmanager
def without_adapter(model: nn.Module) -> Generator[None]:
    """Context in which ``model`` computes without its adapter; trained parameters stay trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:  # FSDP, in its first forward, looks at which are
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def is_adapter(name: str) -> bool:
    """Whether ``name`` is a weight of an adapter."""
    return _ADAPTER.search(name) is not None


def merged_name(name: str) -> str:
    """Name of a weight, or of an adapter's base weight, in the model without adapters."""
    return _ADAPTER.sub("", name).replace(".base_layer.", ".")


def group_by_base_weight(state: Mapping[str, T]) -> dict[str, list[T]]:
    """Group a state dict by base weight: ``{name: [W]}``, ``{name: [W, A, B]}`` with an adapter.

    Args:
        state: values by the names of a ``state_dict``, in its order.
    """
    parts: dict[str, list[T]] = {}
    for name, part in state.items():
        parts.setdefault(merged_name(name), []).append(part)
    return parts


def merge(parts: list[Tensor], alpha: float) -> Tensor:
    """The weight itself, or W + alpha / r * B A in the dtype of W.

    Args:
        parts: W, or W [out, in], A [r, in] and B [out, r].
        alpha: lora_alpha of the adapter.
    """
    weight, *adapter = parts
    if not adapter:
        return weight
    a, b = (tensor.detach() for tensor in adapter)
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = alpha / a.shape[0]
    product = torch.addmm(weight.detach().to(wide), b.to(wide), a.to(wide), alpha=scale)
    return product.to(weight.dtype)


def adapter_settings(config: LoRAConfig) -> dict[str, Any]:
    """``config`` as plain types, for a checkpoint."""
    targets = config.target_modules
    return asdict(config) | {"target_modules": None if targets is None else sorted(targets)}


def check_adapter(checkpoint: Mapping[str, Any], config: LoRAConfig | None) -> None:
    """Refuse to resume from a checkpoint with another adapter: its alpha is in no weight.

    Args:
        checkpoint: Lightning's checkpoint.
        config: adapter that is trained now; None without one.

    Raises:
        ConfigError: naming both.
    """
    saved, wanted = checkpoint.get(LORA_KEY), None if config is None else adapter_settings(config)
    if saved != wanted:
        raise ConfigError(
            f"the checkpoint was written with lora={saved}, and this run has lora={wanted}. Set "
            "it as it was; to start from what an adapter has learnt, export it and train that."
        )


def _targets(model: Any, wanted: tuple[str, ...] | None) -> list[str]:
    head: object = model.get_output_embeddings()
    beside = beside_text(model)
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and f"{name}.weight" not in beside
    ]
    kinds = {name.rpartition(".")[2] for name in linear}
    if wanted is None:
        wanted = tuple(kinds)
    unknown = sorted(set(wanted) - kinds)
    if unknown or not kinds:
        raise ConfigError(
            f"target_modules names {', '.join(unknown) or 'nothing'}, but the linear layers of "
            f"model type {model.config.model_type!r} beside its head are "
            f"{', '.join(sorted(kinds)) or 'none'}."
        )
    return [name for name in linear if name.rpartition(".")[2] in wanted]


def merged_alpha(lora: LoRAConfig | None, engine_alpha: float | None) -> float | None:
    """The alpha with which adapters are merged for an engine; None: they are sent unmerged.

    Args:
        lora: adapter of the module.
        engine_alpha: lora_alpha of an engine that samples with adapters; None: it does not.

    Raises:
        ConfigError: if the engine awaits an adapter of another alpha, or there is none.
    """
    own = None if lora is None else lora.alpha
    if engine_alpha not in (None, own):
        raise ConfigError(
            f"the engine samples with LoRA adapters of lora_alpha={engine_alpha:g}, and the "
            f"module has lora={lora}. Give it lora=LoRAConfig(alpha={engine_alpha:g})."
        )
    return own if engine_alpha is None else None
