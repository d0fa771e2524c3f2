"""Ranges of the loss settings, and the settings that contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING

from sdp_lightning.config.validation import at_least
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from sdp_lightning.config.loss import LossConfig

Rules = Iterator[tuple[bool, str]]


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "clip_epsilon": (lambda v: 0 < v < 1, "in (0, 1)"),
    "clip_epsilon_high": (lambda v: v > 0, "positive"),
    "dual_clip": (lambda v: v > 1, "above 1, or None for off"),
    "behavior_weight_cap": (lambda v: v > 1, "above 1, or None for off"),
    "behavior_weight_floor": (lambda v: 0 < v < 1, "in (0, 1), or None for off"),
    "bridge_exponent": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "bridge_cap": (lambda v: v >= 1, "at least 1, or None for off"),
    "second_moment_cap": (lambda v: 0 < v < inf, "positive and finite, or None for off"),
    "kl_coefficient": (lambda v: 0 <= v < inf, "finite and 0 or more"),
}


def check_ranges(config: LossConfig) -> None:
    """Raise ``ConfigError`` with the value of the first setting that is out of its range."""
    for name, (is_within, words) in _RANGES.items():
        value: float | None = getattr(config, name)
        if value is not None and not is_within(value):
            raise ConfigError(f"{name} must be {words}, got {value}.")
    if config.aggregation_length is not None:
        at_least("aggregation_length", config.aggregation_length, 1)


def _surrogate_rules(config: LossConfig) -> Rules:
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


def _correction_rules(config: LossConfig) -> Rules:
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


def _mask_rules(config: LossConfig) -> Rules:
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


def _other_rules(config: LossConfig) -> Rules:
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
    yield (
        config.kl_in == "reward" and config.kl_estimator == "weighted_k3",
        "kl_estimator='weighted_k3' weighs tokens by exp(n - b), and kl_in='reward' takes the KL "
        "of b itself, where that is 1. Use kl_estimator='k3'.",
    )
    yield (
        config.kl_in == "reward" and config.kl_tokens == "all",
        "kl_tokens='all' is read by a term of the loss; kl_in='reward' always takes all tokens. "
        "Remove one of the two.",
    )


def contradictions(config: LossConfig) -> Iterator[str]:
    """Why ``config`` cannot work, one sentence for each contradiction."""
    rules = (_surrogate_rules, _correction_rules, _mask_rules, _other_rules)
    yield from (reason for rule in rules for wrong, reason in rule(config) if wrong)
