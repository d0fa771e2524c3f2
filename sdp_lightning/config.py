"""Settings: frozen, validated when made, picklable.

Each class is one concern. A setting that is out of range, or contradicts another one of its class,
raises ``ConfigError`` with the value and the remedy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from sdp_lightning.errors import ConfigError

MissingProximal = Literal["behavior", "loglinear", "decoupled", "drop"]
TrustRegion = Literal["segment", "proximal", "behavior"]
OnOverdue = Literal["drop", "wait", "mask"]
LONGEST_S = 1e9  # of a deadline: threads cannot wait for ever by a number


@dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are generated while the trainer trains. Counts: groups, of the whole world.

    Args:
        enable_segment_wise_ppo: the switch. True: staleness is bounded, stale groups are purged and
            their capacity given back, segments are scored under the version after their own. False:
            standard decoupled PPO: ``max_head_lag`` bounds submission only, and nothing is dropped,
            so ``on_overdue``, ``requeue_dropped`` and ``missing_proximal`` have no effect.
        batch_size: groups a training step consumes.
        max_head_lag: the most versions that a trained token may be old; 0 is exactly on-policy.
        max_concurrent: the most groups at once; None: ``(max_head_lag + 1) * batch_size``.
        missing_proximal: what stands in for a segment proximal whose window has passed:
            ``"behavior"`` (q := b), ``"loglinear"``, ``"decoupled"`` (q := x), or ``"drop"`` it.
        on_overdue: what happens to a group that is still running when it goes stale: ``"drop"`` it,
            ``"wait"`` for it before a batch is handed out, or ``"mask"`` its stale tokens.
        timeout_s: longest wait for a batch.
        drain_s: longest wait, in a publish, for outstanding requests to come back.
        max_failures: rollouts that may fail before the error reaches the trainer.
        max_rejected_in_a_row: rejected groups, with none accepted between, that count as endless.
        num_epochs: passes over the prompts; None repeats them for ever.
        shuffle: reshuffle the prompts in every epoch, by (seed, epoch).
        seed: of the order of prompts and of every sampled token.
        requeue_dropped: submit the row of a dropped group again.

    Raises:
        ConfigError: naming the value.
    """

    enable_segment_wise_ppo: bool = True
    batch_size: int = 8
    max_head_lag: int = 2
    max_concurrent: int | None = None
    missing_proximal: MissingProximal = "behavior"
    on_overdue: OnOverdue = "drop"
    timeout_s: float = 600.0
    drain_s: float = 30.0
    max_failures: int = 0
    max_rejected_in_a_row: int = 100
    num_epochs: int | None = None
    shuffle: bool = True
    seed: int = 0
    requeue_dropped: bool = False

    def __post_init__(self) -> None:
        _at_least("batch_size", self.batch_size, 1)
        _at_least("max_head_lag", self.max_head_lag, 0)
        _at_least("max_failures", self.max_failures, 0)
        _at_least("seed", self.seed, 0)
        _at_least("max_rejected_in_a_row", self.max_rejected_in_a_row, 1)
        if self.max_concurrent is not None:
            _at_least("max_concurrent", self.max_concurrent, 1)
        if self.num_epochs is not None:
            _at_least("num_epochs", self.num_epochs, 1)
        _one_of(
            "missing_proximal",
            self.missing_proximal,
            ("behavior", "loglinear", "decoupled", "drop"),
        )
        _one_of("on_overdue", self.on_overdue, ("drop", "wait", "mask"))
        for name, value in (("timeout_s", self.timeout_s), ("drain_s", self.drain_s)):
            if not 0 < value <= LONGEST_S:
                raise ConfigError(
                    f"{name} must be above 0 and at most {LONGEST_S:.0e} s, got {value}."
                )

    def share(self, num_ranks: int) -> RolloutConfig:
        """One rank's part: counts are divided, all else stays.

        Raises:
            ConfigError: if a count cannot be divided evenly.
        """
        if num_ranks == 1:
            return self
        for name, count in (("batch_size", self.batch_size), ("max_concurrent", self.concurrency)):
            if count % num_ranks:
                below, above = count // num_ranks * num_ranks, -(-count // num_ranks) * num_ranks
                near = f"{below} or {above}" if below else str(above)
                raise ConfigError(
                    f"{name}={count} groups cannot be divided evenly over {num_ranks} processes: "
                    f"use {near}."
                )
        return replace(
            self,
            batch_size=self.batch_size // num_ranks,
            max_concurrent=self.concurrency // num_ranks,
        )

    @property
    def concurrency(self) -> int:
        """The most groups generated at once."""
        if self.max_concurrent is not None:
            return self.max_concurrent
        return (self.max_head_lag + 1) * self.batch_size


@dataclass(frozen=True)
class LossConfig:
    """The policy loss: trust region, correction from the behavior policy, bounds on it.

    Args:
        clip_epsilon: the ratio is clipped to ``[1 - clip_epsilon, 1 + clip_epsilon_high]``.
        clip_epsilon_high: None is ``clip_epsilon``.
        dual_clip: caps the loss where the advantage is negative: ``dual_clip * |A|``; None is off.
        behavior_weight_cap: tokens above it get weight 0 (masked, not clamped); None is off.
        behavior_weight_floor: tokens below it get weight 0; None is off.
        rejection_on: what cap and floor test: ``"drift"``, exp(x - b), or the ``"weight"`` itself.
        trust_region: the centre: ``"segment"`` (q), ``"proximal"`` (x) or ``"behavior"`` (b).
        bridge_exponent: only for ``"proximal"``: 1 is decoupled PPO, 0 leaves the bridge out.
        bridge_cap: only for ``"proximal"``: the bridge exp(x - q) is at most this; None is off.

    Raises:
        ConfigError: naming the value, or the two settings that contradict each other.
    """

    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = None
    dual_clip: float | None = None
    behavior_weight_cap: float | None = 5.0
    behavior_weight_floor: float | None = None
    rejection_on: Literal["drift", "weight"] = "drift"
    trust_region: TrustRegion = "segment"
    bridge_exponent: float = 1.0
    bridge_cap: float | None = None

    def __post_init__(self) -> None:
        _one_of("rejection_on", self.rejection_on, ("drift", "weight"))
        _one_of("trust_region", self.trust_region, ("segment", "proximal", "behavior"))
        if not 0 < self.clip_epsilon < 1:
            raise ConfigError(f"clip_epsilon must be in (0, 1), got {self.clip_epsilon}.")
        if self.clip_epsilon_high is not None and not self.clip_epsilon_high > 0:
            raise ConfigError(f"clip_epsilon_high must be positive, got {self.clip_epsilon_high}.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"dual_clip must be above 1, or None for off, got {self.dual_clip}.")
        cap, floor = self.behavior_weight_cap, self.behavior_weight_floor
        if cap is not None and not cap > 1:
            raise ConfigError(f"behavior_weight_cap must be above 1, or None for off, got {cap}.")
        if floor is not None and not 0 < floor < 1:
            raise ConfigError(
                f"behavior_weight_floor must be in (0, 1), or None for off, got {floor}."
            )
        if not 0 <= self.bridge_exponent <= 1:
            raise ConfigError(f"bridge_exponent must be in [0, 1], got {self.bridge_exponent}.")
        if self.bridge_cap is not None and not self.bridge_cap >= 1:
            raise ConfigError(
                f"bridge_cap must be at least 1, or None for off, got {self.bridge_cap}."
            )
        if self.trust_region != "proximal" and (
            self.bridge_exponent != 1 or self.bridge_cap is not None
        ):
            raise ConfigError(
                f"bridge_exponent={self.bridge_exponent} and bridge_cap={self.bridge_cap} act only "
                f"with trust_region='proximal', not {self.trust_region!r}. Remove one of the two."
            )
        if self.trust_region == "behavior" and self.rejection_on == "weight":
            raise ConfigError(
                "trust_region='behavior' has weight 1 for every token, so rejection_on='weight' "
                "would reject nothing. Use rejection_on='drift'."
            )

    @property
    def upper_epsilon(self) -> float:
        """The epsilon of the upper clip bound."""
        return self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high

    @property
    def needs_segment_proximal(self) -> bool:
        """Whether the estimator reads q at all."""
        if self.trust_region == "proximal":
            return self.bridge_exponent != 1 or self.bridge_cap is not None
        return self.trust_region == "segment"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Steps are optimizer steps.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled.
        betas: of AdamW.
        gradient_clip_val: largest L2 norm of the gradient; None is off.
        schedule: after the warm-up: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay to 0.
        warmup_steps: steps of linear warm-up.
        total_steps: where the decay ends; None is the Trainer's ``max_steps``.

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

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        _at_least("warmup_steps", self.warmup_steps, 0)
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, got {self.lr}.")
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ConfigError(
                f"gradient_clip_val must be positive, or None: got {self.gradient_clip_val}."
            )
        if self.total_steps is not None:
            _at_least("total_steps", self.total_steps, 1)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied with at optimizer step ``step`` of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class UpdateConfig:
    """How one consumed batch becomes optimizer steps: ``num_minibatches * num_epochs`` of them.

    Args:
        num_minibatches: groups are dealt out to this many minibatches, whole.
        num_epochs: passes over the batch.
        max_tokens_per_microbatch: tokens computed at once; bounds memory, does not change the loss.
        layout: ``"shared_prefix"`` computes the prompt of a group once, ``"padded"`` works with
            every model, ``"auto"`` takes the first where the model allows it and it is cheaper.
        scale_advantages_by_std: GRPO's division by the standard deviation of the group.
        max_skipped_in_a_row: a step whose gradient is not finite is skipped; this many without a
            good one between are an error.

    Raises:
        ConfigError: naming the value.
    """

    num_minibatches: int = 1
    num_epochs: int = 1
    max_tokens_per_microbatch: int = 4096
    layout: Literal["auto", "padded", "shared_prefix"] = "auto"
    scale_advantages_by_std: bool = True
    max_skipped_in_a_row: int = 10

    def __post_init__(self) -> None:
        _at_least("max_skipped_in_a_row", self.max_skipped_in_a_row, 1)
        _at_least("num_minibatches", self.num_minibatches, 1)
        _at_least("num_epochs", self.num_epochs, 1)
        _at_least("max_tokens_per_microbatch", self.max_tokens_per_microbatch, 1)
        _one_of("layout", self.layout, ("auto", "padded", "shared_prefix"))

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that one consumed batch makes."""
        return self.num_minibatches * self.num_epochs


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
