"""Where in a model a LoRA adapter can lie, and where it lies unless its config says otherwise.

It can lie on linear layers and on stacks: three-dimensional parameters, one matrix for each expert.
By default it lies on the linear layers of attention, of dense and of shared MLPs. What is decided
here follows from the model's modules, their code and their behavior, not from lists of models.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from sdp_lightning.config.pretrained import beside_text
from sdp_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Targets:
    """What an adapter lies on, by names in the model without it.

    Args:
        layers: linear layers.
        stacks: three-dimensional parameters.
    """

    layers: tuple[str, ...]
    stacks: tuple[str, ...] = ()


def choose_targets(model: Any, wanted: tuple[str, ...] | None) -> Targets:
    """The targets that ``wanted`` names; None is the default. What is left out goes to the log.

    A name is the end of a layer's or stack's own, numbers left out: ``"q_proj"``,
    ``"shared_experts.up_proj"``, ``"experts.gate_up_proj"``. Experts are meant only if nothing else
    has the name.

    Args:
        model: a transformers causal LM that holds its weights.
        wanted: ``target_modules`` of the config.

    Raises:
        ConfigError: naming what is not there, or why an adapter cannot lie there.
    """
    layers, stacks = _linear_layers(model), _stacks(model)
    refused = _refusals(model, layers, stacks)
    routed = _routed(model, layers, stacks)
    kind = model.config.model_type
    if wanted is None:
        chosen = [name for name in layers if name not in refused and name not in routed]
        for reason in sorted(set(refused[name] for name in refused if name in layers)):
            names = _short(name for name in layers if refused.get(name) == reason)
            logger.warning("no adapter on %s of model type %r: %s.", names, kind, reason)
        if routed or stacks:
            names = _short([*routed, *stacks], whole=True)
            logger.info("no adapter on routers and experts: %s; target_modules= adds them.", names)
        if not chosen:
            _raise_unknown((), kind, layers, stacks)
        return Targets(tuple(chosen))
    found = {name: _find(name, layers, stacks, routed) for name in wanted}
    unknown = [name for name, places in found.items() if not places]
    if unknown:
        _raise_unknown(unknown, kind, layers, stacks)
    places = {place for some in found.values() for place in some}
    for place in sorted(places & refused.keys()):
        raise ConfigError(
            f"target_modules names {place} of model type {kind!r}, where no adapter can lie: "
            f"{refused[place]}. Leave it out."
        )
    return Targets(
        tuple(name for name in layers if name in places),
        tuple(name for name in stacks if name in places),
    )


# What there is ------------------------------------------------------------------------------------


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """All layers but the head that multiply their input by a matrix, in the model's order."""
    head: object = model.get_output_embeddings()
    beside = beside_text(model)
    kinds: dict[type, bool] = {nn.Linear: True, Conv1D: True}
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        kind = type(module)
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head
        if is_linear and f"{name}.weight" not in beside:
            if kind not in kinds:
                kinds[kind] = _is_product(module)
            if kinds[kind]:
                layers[name] = module
    return layers


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether a layer of another class than torch's computes what torch's would."""
    weight: Tensor = layer.weight
    values = torch.linspace(-1.0, 1.0, weight.shape[-1], device=weight.device)[None, None]
    values = values.to(weight.dtype)
    try:
        expected, found = linear(values, weight, layer.bias), layer(values)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def _stacks(model: nn.Module) -> dict[str, Tensor]:
    """All three-dimensional parameters but those of convolutions, and of a vision tower."""
    beside = beside_text(model)
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if name and not isinstance(module, _CONVOLUTIONS)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
        if f"{name}.{leaf}" not in beside
    }


def _routed(
    model: Any, layers: Mapping[str, nn.Module], stacks: Mapping[str, Tensor]
) -> dict[str, None]:
    """Linear layers of experts that are modules of their own, and routers.

    A router is beside experts and as wide as they are many.
    """
    settings: dict[str, Any] = model.config.get_text_config(decoder=True).to_dict()
    numbers = {v for k, v in settings.items() if "expert" in k and type(v) is int and v > 1}
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in numbers and "." in name
        if re.search(r"\.\d+\.", name) and len({type(part) for part in module}) == 1
    }
    holders = {name.rpartition(".")[0]: stack.shape[0] for name, stack in stacks.items()} | lists
    counts = {f"{name.rpartition('.')[0]}.": count for name, count in holders.items()}
    routed: dict[str, None] = {}
    for name, layer in layers.items():
        weight: Any = layer.weight
        width = weight.shape[1 if isinstance(layer, Conv1D) else 0]
        if any(name.startswith(f"{some}.") for some in lists) or any(
            name.startswith(block) and width == count for block, count in counts.items()
        ):
            routed[name] = None
    return routed


def _find(
    wanted: str,
    layers: Mapping[str, nn.Module],
    stacks: Mapping[str, Tensor],
    routed: Mapping[str, None],
) -> list[str]:
    for names in ([n for n in layers if n not in routed], routed, stacks):
        found = [name for name in names if _ends_with(name, wanted)]
        if found:
            return found
    experts = [name for name in routed if re.search(r"\.\d+\.\w+$", name)]  # and no routers
    return [n for n in (*experts, *stacks) if _ends_with(n.rpartition(".")[0], wanted)]


def _ends_with(name: str, wanted: str) -> bool:
    return any(f".{form}".endswith(f".{wanted}") for form in (name, _numberless(name)))


# Where it cannot lie ------------------------------------------------------------------------------


def _refusals(
    model: Any, layers: Mapping[str, nn.Module], stacks: Mapping[str, Tensor]
) -> dict[str, str]:
    """Why no adapter can lie on some of them, by name."""
    refused: dict[str, str] = {}
    suspects = [name for name in layers if _weight_is_read(model, name)]
    for name in set(suspects) - _called(model, suspects):
        refused[name] = "its block reads its weight and does not call it, so it would do nothing"
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {id(module) for module in layers.values()}
    for name, layer in layers.items():
        others = [o for o in owners[id(layer.weight)] if id(modules[o]) not in own]
        if others:
            refused[name] = f"its weight is also that of {others[0]}, which would not follow"
    for name, stack in stacks.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        if stack.shape[0] == 1 and _is_transposed(holder):
            refused[name] = "peft does not merge into one expert that is stored transposed"
    by_leaf: dict[str, list[str]] = {}
    for name in (*layers, *(stack.rpartition(".")[0] for stack in stacks)):
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    for leaf, names in by_leaf.items():
        if leaf.isidentifier() and not _peft_takes(model.config, leaf):
            own_names = {*names, *(s for s in stacks if s.rpartition(".")[0] in names)}
            refused |= dict.fromkeys(own_names, f"peft takes no {leaf} of this model type")
    return refused


def _peft_takes(config: Any, leaf: str) -> bool:
    """Whether ``peft`` puts an adapter on a layer of this name in such a model, tried on one."""
    from peft import LoraConfig, inject_adapter_in_model

    sample, block = nn.Module(), nn.Module()
    block.add_module(leaf, nn.Linear(1, 1))
    sample.config = config
    sample.add_module("block", block)
    settings: Any = {"r": 1, "target_modules": [], "target_parameters": [f"block.{leaf}.weight"]}
    with torch.random.fork_rng(devices=()):
        try:
            inject_adapter_in_model(LoraConfig(**settings), sample)
        except ValueError:
            return False
    return True


def _weight_is_read(model: nn.Module, name: str) -> bool:
    block, _, leaf = name.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(block)))
    except (OSError, TypeError):  # a class that was made at run time
        return False
    return f"self.{leaf}.weight" in source


def _called(model: Any, names: list[str]) -> set[str]:
    """The names of the layers that a forward pass over a few tokens calls."""
    called: set[str] = set()

    def note(name: str, *_: object) -> None:
        called.add(name)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names
    ]
    try:
        if names:
            with torch.no_grad():
                tokens = torch.arange(4, device=next(model.parameters()).device)[None]
                model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _is_transposed(holder: nn.Module) -> bool:
    """Whether the matrices of a stack are [in, out]; by the flag that ``peft`` goes by."""
    # foreign: experts of transformers have this flag, or do not
    return bool(getattr(holder, "is_transposed", False))


def is_stored_transposed(holder: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` of ``holder`` is [in, out] or, of experts, [experts, in, out]."""
    return isinstance(holder, Conv1D) or (weight.dim() == 3 and _is_transposed(holder))


# Messages -----------------------------------------------------------------------------------------


def _raise_unknown(
    unknown: Iterable[str], kind: str, layers: Iterable[str], stacks: Iterable[str]
) -> None:
    experts = _short(stacks, whole=True)
    raise ConfigError(
        f"target_modules names {', '.join(sorted(unknown)) or 'nothing'}, but the linear layers of "
        f"model type {kind!r} beside its head are {_short(layers) or 'none'}"
        + (f", and its experts {experts}." if experts else ".")
    )


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def _short(names: Iterable[str], *, whole: bool = False) -> str:
    """Last parts of names, or the last two, each once."""
    parts = (_numberless(name).split(".") for name in names)
    return ", ".join(sorted({".".join(part[-2 if whole else -1 :]) for part in parts}))
