"""Settings of the optimizer, and of the optimizer steps on a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sdp_lightning.config.validation import at_least, check_types
from sdp_lightning.errors import ConfigError

StandardDeviation = Literal["population", "sample"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or an optimizer by its path, and its schedule. Steps are optimizer steps.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled.
        betas: AdamW's betas.
        gradient_clip_val: largest L2 norm of the gradient; None is off.
        schedule: after the warm-up: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay to 0.
        warmup_steps: steps of linear warm-up.
        total_steps: step at which the decay ends; None is where ``max_steps`` of the Trainer or the
            epochs end the run.
        scale_lr_by_ess: multiply the learning rate of every step with the square root of the
            effective sample size of its tokens, as a share (``ess/token``); the factor is logged
            as ``train/lr_scale``.
        class_path: another optimizer in place of AdamW: ``"bitsandbytes.optim.AdamW8bit"`` or
            ``"path/to/file.py:name"``; clipping and schedule are as for AdamW.
        init_args: its arguments beside the parameters; ``lr`` and the like stand here then.

    Raises:
        ConfigError: naming the value.
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip_val: float | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    scale_lr_by_ess: bool = False
    class_path: str | None = None
    init_args: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        check_types(self)
        self._check_path()
        at_least("warmup_steps", self.warmup_steps, 0)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {self.lr}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be 0 or more, got {self.weight_decay}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}.")
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ConfigError(
                f"gradient_clip_val must be positive, or None: got {self.gradient_clip_val}."
            )
        if self.total_steps is not None:
            at_least("total_steps", self.total_steps, 1)

    def _check_path(self) -> None:
        if not isinstance(self.init_args, Mapping):
            raise ConfigError(f"init_args must be a mapping, not {type(self.init_args).__name__}.")
        if self.class_path is None:
            if self.init_args:
                raise ConfigError(f"init_args of {list(self.init_args)} need a class_path.")
            return
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in ("lr", "weight_decay", "betas") and value != setting.default:
                raise ConfigError(
                    f"{setting.name} is AdamW's and has no effect on {self.class_path}: "
                    f"put {setting.name} into its init_args."
                )

    def factor(self, step: int, total: int) -> float:
        """Factor of the learning rate at optimizer step ``step`` of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class UpdateConfig:
    """Optimizer steps on one consumed batch: ``num_minibatches * num_epochs`` of them.

    Args:
        num_minibatches: minibatches that the groups, whole, are divided into.
        num_epochs: passes over the batch.
        max_tokens_per_microbatch: tokens computed at once; bounds memory, does not change the loss.
        layout: ``"padded"`` works with every model; ``"packed"`` lays rows one after another,
            without padding; ``"shared_prefix"`` computes the prompt of a group once; ``"auto"``
            takes the cheapest of those that the model allows.
        advantages: reward less the mean of its ``"group"`` (GRPO), or of its siblings without it
            (``"rloo"``); ``"gdpo"`` normalizes each of several rewards in its group, adds them up
            by their weights, and normalizes the sums over the batch of all ranks.
        scale_advantages_by_std: GRPO's division by the standard deviation of the group; None is
            True but for ``"rloo"``. Dr. GRPO leaves it out, and has ``LossConfig(aggregation=
            "constant")``.
        group_std: the standard deviation of a group of G: of a ``"population"`` (over G), or of a
            ``"sample"`` (over G - 1), as TRL, verl, AReaL, OpenRLHF, SkyRL and NeMo-RL have it. Of
            GDPO also that of the batch.
        mask_truncated: leave the tokens of a trajectory that did not end by itself out of the loss
            and its denominators. Its reward stays in the mean and the deviation of its group.
        max_skipped_in_a_row: a step whose gradient is not finite is skipped; this many without a
            good one between are an error.
        max_uniform_in_a_row: so many batches in a row in which no group has two different rewards
            end the run with an error: there is nothing to learn. None never does.

    Raises:
        ConfigError: naming the value.
    """

    num_minibatches: int = 1
    num_epochs: int = 1
    max_tokens_per_microbatch: int = 4096
    layout: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    advantages: Literal["group", "rloo", "gdpo"] = "group"
    scale_advantages_by_std: bool | None = None
    group_std: StandardDeviation = "population"
    mask_truncated: bool = False
    max_skipped_in_a_row: int = 10
    max_uniform_in_a_row: int | None = 100

    def __post_init__(self) -> None:
        check_types(self)
        at_least("max_skipped_in_a_row", self.max_skipped_in_a_row, 1)
        if self.max_uniform_in_a_row is not None:
            at_least("max_uniform_in_a_row", self.max_uniform_in_a_row, 1)
        at_least("num_minibatches", self.num_minibatches, 1)
        at_least("num_epochs", self.num_epochs, 1)
        at_least("max_tokens_per_microbatch", self.max_tokens_per_microbatch, 1)
        if self.advantages == "rloo" and self.scale_advantages_by_std:
            raise ConfigError(
                "advantages='rloo' is a baseline without bias, which scale_advantages_by_std=True "
                "would bias. Remove one of the two."
            )
        if self.advantages == "gdpo" and self.scale_advantages_by_std is False:
            raise ConfigError(
                "advantages='gdpo' is the division of each reward by its own standard deviation, "
                "which scale_advantages_by_std=False leaves out. Remove one of the two."
            )
        if self.group_std == "sample" and not self.scales_by_std:
            raise ConfigError(
                "group_std='sample' with advantages that are not divided by a standard deviation "
                f"(advantages={self.advantages!r}, scale_advantages_by_std="
                f"{self.scale_advantages_by_std}) has no effect. Remove it."
            )

    @property
    def scales_by_std(self) -> bool:
        """Whether advantages are divided by the standard deviation of their group."""
        return self.advantages != "rloo" and self.scale_advantages_by_std is not False

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that one consumed batch makes."""
        return self.num_minibatches * self.num_epochs
