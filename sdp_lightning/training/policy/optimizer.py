"""The optimizer and its schedule, from the settings: AdamW, or another one by its path."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdp_lightning.config import OptimizerConfig
from sdp_lightning.config.import_path import load_object
from sdp_lightning.errors import ConfigError


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, max_steps: int | None
) -> tuple[Optimizer, LambdaLR]:
    """The optimizer of the trainable ``parameters``, and its schedule.

    Args:
        parameters: parameters of the model.
        config: the settings.
        max_steps: steps of the run, where a decay ends unless ``config`` sets its end; None if they
            are not known.

    Raises:
        ConfigError: if a decay would end before its warm-up, or the optimizer of ``class_path``
            refuses the parameters or its arguments.
    """
    make, arguments = optimizer_kind(config)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.class_path is None and all(map(_is_plain_on_cpu, trained)):
        arguments = {**arguments, "fused": True}  # the same step in a third of the time
    try:
        optimizer = make(trained, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{config.class_path or 'AdamW'} cannot be made of {len(trained)} parameters and "
            f"{dict(arguments)}: {error}. Several optimizers, each of some parameters, are what "
            "an overridden configure_optimizers() returns."
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"class_path={config.class_path!r} makes no torch.optim.Optimizer, but "
            f"{type(optimizer).__name__}."
        )
    total = config.total_steps or max_steps or 0
    if config.schedule != "constant" and total <= config.warmup_steps:
        found = f"got {total}" if total else "which neither says, nor a known number of epochs"
        raise ConfigError(
            f"schedule={config.schedule!r} needs total_steps (or the Trainer's max_steps) "
            f"above warmup_steps={config.warmup_steps}, {found}."
        )
    return optimizer, LambdaLR(optimizer, lambda step: config.factor(step, total))


def _is_plain_on_cpu(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.device.type == "cpu"


def optimizer_kind(config: OptimizerConfig) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """What makes the optimizer of ``config`` from parameters, and its further arguments.

    Raises:
        ConfigError: if its library or its class is not there, or an argument has no such name.
    """
    if config.class_path is None:
        decay = config.weight_decay
        return AdamW, {"lr": config.lr, "betas": config.betas, "weight_decay": decay}
    path, what = config.class_path, f"optimizer.class_path={config.class_path!r}"
    module, _, name = path.rpartition(".")
    top = module.partition(".")[0]
    if ":" not in path:
        if not top or importlib.util.find_spec(top) is None:
            raise ConfigError(
                f"{what}: there is no module {top or path!r} here. Install its package into this "
                "environment, or write 'package.module.Class' or 'path/to/file.py:Class'."
            )
        path = f"{module}:{name}"
    try:
        make = load_object(path)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    if not callable(make):
        raise ConfigError(f"{what} names no class, but {type(make).__name__}.")
    try:
        signature = inspect.signature(make)
    except ValueError:  # written in C: it judges its arguments itself
        return make, config.init_args
    try:
        signature.bind([], **config.init_args)
    except TypeError as error:
        known = ", ".join([*signature.parameters][1:])
        raise ConfigError(f"{what}: init_args: {error}; it has {known}.") from error
    return make, config.init_args
