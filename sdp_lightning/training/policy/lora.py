"""LoRA adapters: added to a model by ``peft``, switched off, and merged one weight at a time.

``peft`` puts its layers into the model itself, which stays the class it was. A linear layer
``P.weight`` is then called ``P.base_layer.weight``, beside ``P.lora_A.default.weight`` [r, in] and
``P.lora_B.default.weight`` [out, r]. A stack of E experts' matrices has one more ``base_layer`` for
every adapter on its module, and A [E r, in], B [out, r E].
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdp_lightning.config import LoRAConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora_targets import (
    Targets,
    choose_targets,
    is_stored_transposed,
)

T = TypeVar("T")
_ADAPTER = re.compile(r"\.lora_(A|B)\.[^.]+(?=\.weight$)")
_BELOW = re.compile(r"(\.base_layer)+(?=\.)")  # in the name of a weight below adapters
_NUM_NAMED = 3


def add_adapter(model: Any, config: LoRAConfig, targets: Targets | None = None) -> Targets:
    """Freeze ``model``, a transformers causal LM, and put a trainable adapter on it.

    The adapter is in float32 if the model is in half precision, as an optimizer needs it. Layers
    that share a weight share their adapter.

    Args:
        model: the causal LM.
        config: the adapter.
        targets: where it lies; None is what ``config`` says, which needs the model's weights.

    Returns:
        Where it lies.

    Raises:
        ConfigError: if ``peft`` is missing, or ``config`` names what takes no adapter.
    """
    _require_peft()
    if targets is None:
        targets = choose_targets(model, config.target_modules)
    places: dict[int, list[str]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(place)
    weights = [f"{name}.weight" for name in targets.layers] + list(targets.stacks)
    held = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    _inject(model, config, targets)
    wanted: set[str] = set()
    for name, module in held.items():
        first, _, weight = name.rpartition(".")
        for place in places[id(module)]:
            wanted.add(f"{place}.{weight}")
            if model.get_submodule(place) is module:  # one module in several places
                block, _, leaf = place.rpartition(".")
                setattr(model.get_submodule(block), leaf, model.get_submodule(first))
    _check_places(wanted, set(adapted_weights(model)))
    _share_adapters(model)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return targets


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ConfigError(
            "lora= needs the package peft, which is not installed: pip install "
            "'sdp-lightning[lora]'."
        )


def _inject(model: Any, config: LoRAConfig, targets: Targets) -> None:
    """Let ``peft`` adapt the targets, in a module without a config.

    There it adapts what it is told, and not what it knows of model types: of some it would take
    gate_proj for a parameter of experts.
    """
    from peft import LoraConfig, inject_adapter_in_model

    unknown = nn.Module()
    unknown.add_module("policy", model)
    settings: Any = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": [f"policy.{name}" for name in targets.layers],
        "target_parameters": [f"policy.{name}" for name in targets.stacks],
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it sets it, as it should
        inject_adapter_in_model(LoraConfig(**settings), unknown)


def placed_by_peft(model: Any, settings: Mapping[str, object]) -> dict[str, torch.Size] | None:
    """The shapes of the weights that ``peft`` adds to ``model``, by name; None if it refuses.

    Args:
        model: a causal LM; it is changed.
        settings: an ``adapter_config.json``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    kinds = ("peft_type", "task_type")
    chosen: Any = {key: value for key, value in settings.items() if key not in kinds}
    try:
        with warnings.catch_warnings(action="ignore"):  # of settings that do not fit
            inject_adapter_in_model(LoraConfig(**chosen), model)
    except ValueError:
        return None
    return {name: w.shape for name, w in model.state_dict().items() if is_adapter(name)}


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with an adapter: names in the model's ``state_dict``.

    Args:
        a: name of A.
        b: name of B.
        transposed: whether the weight is stored as [in, out].
        is_stack: whether it is one matrix for each expert.
    """

    a: str
    b: str
    transposed: bool
    is_stack: bool


def adapted_weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """All weights with an adapter, by their names in the model without adapters."""
    weights: dict[str, AdaptedWeight] = {}
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        return weights  # maybe there is no peft
    for name, layer in _adapter_layers(model):
        holder, leaf = _held(layer)
        weight: Tensor = getattr(holder, leaf)
        transposed = is_stored_transposed(holder, weight)
        a, b = (f"{name}.lora_{kind}.default.weight" for kind in "AB")
        adapter = AdaptedWeight(a, b, transposed, is_stack=weight.dim() == 3)
        weights[merged_name(f"{name}.{leaf}")] = adapter
    return weights


def _adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, BaseTunerLayer)]


def _held(layer: Any) -> tuple[nn.Module, str]:
    """The module below an adapter, and the name of its weight."""
    # foreign: only peft's wrappers of parameters have a name for one
    return layer.get_base_layer(), getattr(layer, "parameter_name", "weight")


def _check_places(wanted: set[str], found: set[str]) -> None:
    """Refuse adapters elsewhere than asked: ``peft`` rewrites targets of some model types."""
    for fault, names in (("put none on", wanted - found), ("put some on", found - wanted)):
        if names:
            some = ", ".join(sorted(names)[:_NUM_NAMED])
            raise ConfigError(
                f"the adapter does not lie where it was asked to: peft {fault} {some} ({len(names)}"
                " in all). Name other target_modules, or install another version of peft."
            )


def _share_adapters(model: nn.Module) -> None:
    """Give layers that share a weight one adapter: merged, the weight has one value."""
    first: dict[int, Any] = {}
    for _, layer in _adapter_layers(model):
        holder, leaf = _held(layer)
        other = first.setdefault(id(getattr(holder, leaf)), layer)
        if other is not layer:
            layer.lora_A, layer.lora_B = other.lora_A, other.lora_B


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
    return _BELOW.sub("", _ADAPTER.sub("", name))


def group_by_base_weight(
    state: Mapping[str, T], adapted: Mapping[str, AdaptedWeight]
) -> dict[str, list[T]]:
    """Group a state dict by base weight: ``{name: [W]}``, ``{name: [W, A, B]}`` with an adapter.

    Args:
        state: values by the names of a ``state_dict``, in its order.
        adapted: weights with an adapter, by :func:`adapted_weights`.
    """
    parts = {merged_name(name): [part] for name, part in state.items() if not is_adapter(name)}
    for name, adapter in adapted.items():
        parts[name] += [state[adapter.a], state[adapter.b]]
    return parts


def merge(parts: list[Tensor], alpha: float, *, transposed: bool = False) -> Tensor:
    """The weight itself, or W + alpha / r * B A in the dtype of W.

    Args:
        parts: W, or W [out, in], A [r, in] and B [out, r]; of E experts W [E, out, in], A [E r, in]
            and B [out, r E].
        alpha: lora_alpha of the adapter.
        transposed: whether W is [in, out], or [E, in, out].
    """
    weight, *adapter = parts
    if not adapter:
        return weight
    count = weight.shape[0] if weight.dim() == 3 else 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (tensor.detach().to(wide) for tensor in adapter)
    scale = alpha * count / a.shape[0]
    if weight.dim() == 3:
        a = a.unflatten(0, (count, -1))
        b = b.unflatten(1, (-1, count)).permute(2, 0, 1)
    left, right = (a.mT, b.mT) if transposed else (b, a)
    add = torch.baddbmm if weight.dim() == 3 else torch.addmm
    return add(weight.detach().to(wide), left, right, alpha=scale).to(weight.dtype)


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
