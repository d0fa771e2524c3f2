"""AdamW and its schedule, from the settings."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from sdp_lightning.config import OptimizerConfig
from sdp_lightning.errors import ConfigError


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, max_steps: int
) -> tuple[AdamW, LambdaLR]:
    """The optimizer of the trainable ``parameters``, and its schedule.

    Args:
        parameters: parameters of the model.
        config: the settings.
        max_steps: the Trainer's ``max_steps``, where a decay ends unless ``config`` sets its end.

    Raises:
        ConfigError: if a decay would end before its warm-up.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    total = config.total_steps or max_steps
    if config.schedule != "constant" and total <= config.warmup_steps:
        raise ConfigError(
            f"schedule={config.schedule!r} needs total_steps (or the Trainer's max_steps) "
            f"above warmup_steps={config.warmup_steps}, got {total}."
        )
    return optimizer, LambdaLR(optimizer, lambda step: config.factor(step, total))
