"""The objective: estimator, bounds on it, and what it is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdp_lightning.config.checks import one_of
from sdp_lightning.errors import ConfigError

TrustRegion = Literal["segment", "proximal", "behavior"]


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
        one_of("rejection_on", self.rejection_on, ("drift", "weight"))
        one_of("trust_region", self.trust_region, ("segment", "proximal", "behavior"))
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
