"""The objective: estimator, bounds on it, and what it is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdp_lightning.config.validation import at_least, one_of
from sdp_lightning.errors import ConfigError

TrustRegion = Literal["segment", "past", "proximal", "behavior"]

_CHOICES = {
    "rejection_on": ("drift", "weight"),
    "trust_region": ("segment", "past", "proximal", "behavior"),
    "surrogate": ("ppo", "cispo", "unclipped"),
    "ratio_level": ("token", "sequence"),
    "correction": ("mask", "truncate"),
    "rejection_level": ("token", "sequence", "geometric"),
    "aggregation": ("token", "sequence", "constant"),
    "proximal": ("recompute", "loglinear"),
    "segment_proximal": ("scored", "loglinear"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_in": ("loss", "reward"),
}


@dataclass(frozen=True)
class LossConfig:
    """The policy loss: trust region, correction from the behavior policy, bounds on it.

    Log-probs: b behavior, q segment proximal, x proximal, n target; m is the centre, the weight is
    ``w = exp(m - b)``, the ratio ``r = exp(n - m)``, the drift ``exp(x - b)``.

    | as published | settings |
    |---|---|
    | decoupled PPO | `trust_region="proximal"` |
    | PPO, GRPO | `trust_region="behavior"`, GRPO with `aggregation="sequence"` |
    | DAPO's clip-higher | `clip_epsilon_high=0.28` |
    | TIS | `trust_region="proximal", correction="truncate", rejection_on="weight"` |
    | IcePop | `trust_region="proximal", rejection_on="weight"`, cap and floor |
    | MIS | the same with `rejection_level="sequence"` or `"geometric"` |
    | GSPO | around behavior, `ratio_level`, `aggregation`: `"sequence"`; epsilons ~ 1e-4 |
    | CISPO | `surrogate="cispo", trust_region="behavior"` |
    | M2PO | `surrogate="unclipped", trust_region="behavior", second_moment_cap=0.04` |
    | Dr. GRPO | `aggregation="constant", aggregation_length=...` |

    The cap of 5 on the drift stays in force in all of them unless ``behavior_weight_cap=None``.

    Args:
        clip_epsilon: the ratio is clipped to ``[1 - clip_epsilon, 1 + clip_epsilon_high]``.
        clip_epsilon_high: None is ``clip_epsilon``.
        dual_clip: caps the loss where the advantage is negative: ``dual_clip * |A|``; None is off.
        behavior_weight_cap: what lies above it is corrected (see ``correction``); None is off.
        behavior_weight_floor: what lies below it is corrected; None is off.
        rejection_on: what cap and floor test: ``"drift"``, exp(x - b), or the ``"weight"`` itself.
        trust_region: the centre: ``"segment"`` (q), ``"past"`` (q, but b at lag 1, where q is x),
            ``"proximal"`` (x) or ``"behavior"`` (b).
        bridge_exponent: only for ``"proximal"``: 1 is decoupled PPO, 0 leaves the bridge out.
        bridge_cap: only for ``"proximal"``: the bridge exp(x - q) is at most this; None is off.
        surrogate: ``"ppo"``: the pessimistic minimum; ``"cispo"``: w r, detached and at most
            1 + clip_epsilon_high, times n, so that every token keeps a gradient; ``"unclipped"``;
            or where to find a function of one's own, ``"path/to/file.py:name"``, with the arguments
            and results of those in :mod:`~sdp_lightning.objective.surrogates`.
        ratio_level: weight and ratio of each ``"token"``, or of the ``"sequence"``: the geometric
            mean over its tokens, clipped as one.
        correction: what becomes of a token outside cap and floor: weight 0 (``"mask"``; the
            denominator stays) or the weight clamped to them (``"truncate"``).
        rejection_level: cap and floor test each ``"token"``, the product over the ``"sequence"``,
            or its ``"geometric"`` mean; the last two mask the whole sequence.
        second_moment_cap: the mean of (x - b)^2 over the tokens that have moved in the direction
            of their advantage is at most this; the farthest are masked. None is off.
        behavior_mask: masks tokens that, at the start of the step, have left the clip range around
            b in the direction of their advantage.
        aggregation: mean over tokens (``"token"``), mean over sequences of their means
            (``"sequence"``), or sum over sequences x ``aggregation_length`` (``"constant"``).
        aggregation_length: tokens; only for ``"constant"``.
        proximal: x by a forward at the start of the step (``"recompute"``; none where one
            optimizer step follows), or on the ``"loglinear"`` way from b to n.
        segment_proximal: q for lags above 1: ``"scored"`` by the trainer at its time, or on the
            ``"loglinear"`` way from b to x.
        kl_coefficient: weight of the KL to the reference policy; 0 is off.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_in: whether the KL is a term of the ``"loss"`` or taken off the ``"reward"``.

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
    surrogate: str = "ppo"
    ratio_level: Literal["token", "sequence"] = "token"
    correction: Literal["mask", "truncate"] = "mask"
    rejection_level: Literal["token", "sequence", "geometric"] = "token"
    second_moment_cap: float | None = None
    behavior_mask: bool = False
    aggregation: Literal["token", "sequence", "constant"] = "token"
    aggregation_length: int | None = None
    proximal: Literal["recompute", "loglinear"] = "recompute"
    segment_proximal: Literal["scored", "loglinear"] = "scored"
    kl_coefficient: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if name != "surrogate" or not self.has_own_surrogate:
                one_of(name, getattr(self, name), choices)
        _check_ranges(self)
        for wrong, reason in (
            *_surrogate_rules(self),
            *_correction_rules(self),
            *_mask_rules(self),
            *_other_rules(self),
        ):
            if wrong:
                raise ConfigError(reason)

    @property
    def upper_epsilon(self) -> float:
        """The epsilon of the upper clip bound."""
        return self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high

    @property
    def needs_segment_proximal(self) -> bool:
        """Whether the estimator reads q at all."""
        return self.trust_region in ("segment", "past") or self.bends_bridge

    @property
    def needs_segment_scores(self) -> bool:
        """Whether the trainer must score segments: q is read, and not made log-linear."""
        return self.needs_segment_proximal and self.segment_proximal == "scored"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of a reference policy are read."""
        return self.kl_coefficient > 0

    @property
    def bends_bridge(self) -> bool:
        """Whether the bridge exp(x - q) is not taken whole."""
        return self.bridge_exponent != 1 or self.bridge_cap is not None

    @property
    def has_own_surrogate(self) -> bool:
        """Whether the surrogate is a function that is named by its place."""
        return ":" in self.surrogate

    @property
    def has_bounds(self) -> bool:
        """Whether there is a cap or a floor."""
        return self.behavior_weight_cap is not None or self.behavior_weight_floor is not None


_Rules = Iterator[tuple[bool, str]]


def _check_ranges(config: LossConfig) -> None:
    if not 0 < config.clip_epsilon < 1:
        raise ConfigError(f"clip_epsilon must be in (0, 1), got {config.clip_epsilon}.")
    if config.clip_epsilon_high is not None and not config.clip_epsilon_high > 0:
        raise ConfigError(f"clip_epsilon_high must be positive, got {config.clip_epsilon_high}.")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise ConfigError(f"dual_clip must be above 1, or None for off, got {config.dual_clip}.")
    cap, floor = config.behavior_weight_cap, config.behavior_weight_floor
    if cap is not None and not cap > 1:
        raise ConfigError(f"behavior_weight_cap must be above 1, or None for off, got {cap}.")
    if floor is not None and not 0 < floor < 1:
        raise ConfigError(f"behavior_weight_floor must be in (0, 1), or None for off, got {floor}.")
    if not 0 <= config.bridge_exponent <= 1:
        raise ConfigError(f"bridge_exponent must be in [0, 1], got {config.bridge_exponent}.")
    if config.bridge_cap is not None and not config.bridge_cap >= 1:
        raise ConfigError(
            f"bridge_cap must be at least 1, or None for off, got {config.bridge_cap}."
        )
    second = config.second_moment_cap
    if second is not None and not 0 < second < float("inf"):
        raise ConfigError(
            f"second_moment_cap must be positive and finite, or None for off, got {second}."
        )
    if not 0 <= config.kl_coefficient < float("inf"):
        raise ConfigError(
            f"kl_coefficient must be finite and 0 or more, got {config.kl_coefficient}."
        )
    if config.aggregation_length is not None:
        at_least("aggregation_length", config.aggregation_length, 1)


def _surrogate_rules(config: LossConfig) -> _Rules:
    """Contradictions of the surrogate, each with whether it is there."""
    yield (
        config.surrogate in ("cispo", "unclipped") and config.dual_clip is not None,
        f"dual_clip={config.dual_clip} bounds the loss of surrogate='ppo'; "
        f"surrogate={config.surrogate!r} "
        + ("bounds its weight already" if config.surrogate == "cispo" else "has no bound by name")
        + ". Remove one of the two.",
    )
    yield (
        config.surrogate == "cispo" and config.correction == "truncate",
        "surrogate='cispo' clamps the whole importance weight exp(n - b), and "
        "correction='truncate' a factor of it once more. Use correction='mask'.",
    )
    yield (
        config.surrogate == "cispo" and config.trust_region != "behavior",
        "surrogate='cispo' clamps exp(n - b), which no centre changes, so trust_region="
        f"{config.trust_region!r} would do nothing. Set trust_region='behavior', which needs no "
        "scoring.",
    )
    centre_matters = (
        config.behavior_mask
        or config.bends_bridge
        or (config.rejection_on == "weight" and config.has_bounds)
    )
    yield (
        config.surrogate == "unclipped"
        and config.trust_region != "behavior"
        and not centre_matters,
        "surrogate='unclipped' without a bound on the weight is exp(n - b) around every centre, so "
        f"trust_region={config.trust_region!r} would do nothing. Set trust_region='behavior', "
        "which needs no scoring.",
    )
    yield (
        config.surrogate == "unclipped"
        and config.clip_epsilon_high is not None
        and not config.behavior_mask,
        f"clip_epsilon_high={config.clip_epsilon_high} is read by nothing under "
        "surrogate='unclipped'. Remove one of the two.",
    )
    yield (
        config.ratio_level == "sequence" and config.bends_bridge,
        f"bridge_exponent={config.bridge_exponent} and bridge_cap={config.bridge_cap} act on "
        "single tokens, and ratio_level='sequence' averages them first. Remove one of the two.",
    )


def _correction_rules(config: LossConfig) -> _Rules:
    """Contradictions of bridge, cap and floor."""
    yield (
        config.trust_region != "proximal" and config.bends_bridge,
        f"bridge_exponent={config.bridge_exponent} and bridge_cap={config.bridge_cap} act only "
        f"with trust_region='proximal', not {config.trust_region!r}. Remove one of the two.",
    )
    yield (
        config.trust_region == "behavior" and config.rejection_on == "weight",
        "trust_region='behavior' has weight 1 for every token, so rejection_on='weight' "
        "would reject nothing. Use rejection_on='drift'.",
    )
    yield (
        config.correction == "truncate" and config.rejection_on != "weight",
        "correction='truncate' clamps the weight, and rejection_on='drift' tests another number. "
        "Set rejection_on='weight', or correction='mask'.",
    )
    yield (
        config.correction == "truncate" and config.rejection_level != "token",
        "correction='truncate' clamps weights and rejects nothing, so rejection_level="
        f"{config.rejection_level!r} would do nothing. Use correction='mask'.",
    )
    yield (
        config.correction == "truncate" and config.bridge_cap is not None,
        f"correction='truncate' and bridge_cap={config.bridge_cap} both clamp the bridge: the "
        "correction would be cut twice. Remove one of the two.",
    )
    yield (
        config.rejection_level != "token" and not config.has_bounds,
        f"rejection_level={config.rejection_level!r} tests cap and floor, and both are None. Set "
        "behavior_weight_cap or behavior_weight_floor.",
    )


def _mask_rules(config: LossConfig) -> _Rules:
    """Contradictions of the masks that look at the advantage."""
    cap = config.second_moment_cap
    for clash, why in (
        (config.behavior_mask, "behavior_mask=True masks the same side of the same drift"),
        (
            config.surrogate != "unclipped",
            f"surrogate={config.surrogate!r} bounds the same tokens (M2PO stands in place of the "
            "clip); set surrogate='unclipped'",
        ),
        (
            config.correction == "truncate",
            "correction='truncate' bounds the same tokens by their weight",
        ),
        (
            config.proximal == "loglinear",
            "proximal='loglinear' saves the forward that this bound needs before the first update",
        ),
        (
            "sequence" in (config.ratio_level, config.aggregation)
            or config.rejection_level != "token",
            "ratio_level, rejection_level and aggregation must be those of tokens: it takes single "
            "tokens out of a sequence, and its mean would change",
        ),
    ):
        yield cap is not None and clash, f"second_moment_cap={cap}: {why}. Remove one of the two."
    yield (
        config.behavior_mask and config.trust_region != "proximal",
        f"behavior_mask=True with trust_region={config.trust_region!r}: this centre remembers the "
        "behavior policy already, and would mask twice. Use trust_region='proximal'.",
    )
    yield (
        config.behavior_mask and config.ratio_level == "sequence",
        "behavior_mask=True masks single tokens, and ratio_level='sequence' clips whole sequences. "
        "Remove one of the two.",
    )


def _other_rules(config: LossConfig) -> _Rules:
    """Contradictions of denominator, log-linear policies and KL."""
    length = config.aggregation_length
    yield (
        config.aggregation == "constant" and length is None,
        "aggregation='constant' divides by sequences x aggregation_length: set aggregation_length, "
        "for example to max_new_tokens.",
    )
    yield (
        config.aggregation != "constant" and length is not None,
        f"aggregation_length={length} is read only with aggregation='constant', not "
        f"{config.aggregation!r}. Remove one of the two.",
    )
    yield (
        config.segment_proximal == "loglinear" and not config.needs_segment_proximal,
        "segment_proximal='loglinear' stands in for q, which trust_region="
        f"{config.trust_region!r} does not read with these settings. Remove one of the two.",
    )
    yield (
        config.kl_coefficient > 0 and config.kl_in == "loss" and config.kl_estimator == "k1",
        "kl_estimator='k1' with kl_in='loss': the gradient of k1 has mean 0 on policy, whatever "
        "the KL is. Use kl_in='reward', or kl_estimator='k2' or 'k3'.",
    )
