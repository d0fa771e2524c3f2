"""The objective: estimator, bounds and aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdp_lightning.config.loss_rules import check_ranges, contradictions
from sdp_lightning.config.validation import check_types, one_of
from sdp_lightning.errors import ConfigError

TrustRegion = Literal["segment", "past", "proximal", "behavior"]


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
    | a mask of sequences | the same with `rejection_level="sequence"` or `"geometric"`; see there |
    | GSPO | around behavior, `ratio_level`, `aggregation`: `"sequence"`; epsilons ~ 1e-4 |
    | CISPO | `surrogate="cispo", trust_region="behavior"` |
    | M2PO | `surrogate="unclipped", trust_region="behavior", second_moment_cap=0.04` |
    | Dr. GRPO | `aggregation="constant", aggregation_length=...` |

    The cap of 5 on the drift stays in force in all of them unless ``behavior_weight_cap=None``.

    Args:
        clip_epsilon: the ratio is clipped to ``[1 - clip_epsilon, 1 + clip_epsilon_high]``.
        clip_epsilon_high: None is ``clip_epsilon``.
        dual_clip: caps the loss where the advantage is negative: ``dual_clip * |A|``; None is off.
        behavior_weight_cap: values above it are corrected (see ``correction``); None is off.
        behavior_weight_floor: values below it are corrected; None is off.
        rejection_on: value under test: the ``"drift"`` exp(x - b), or the ``"weight"``.
        trust_region: the centre: ``"segment"`` (q), ``"past"`` (q, but b at lag 1, where q is x),
            ``"proximal"`` (x) or ``"behavior"`` (b).
        bridge_exponent: only for ``"proximal"``: 1 is decoupled PPO, 0 leaves the bridge out.
        bridge_cap: only for ``"proximal"``: the bridge exp(x - q) is at most this; None is off.
        surrogate: ``"ppo"``: the pessimistic minimum; ``"cispo"``: w r, detached and at most
            1 + clip_epsilon_high, times n, so that every token keeps a gradient; ``"unclipped"``;
            or the import path of your own function, ``"path/to/file.py:name"``, with the arguments
            and results of those in :mod:`~sdp_lightning.objective.surrogates`.
        ratio_level: weight and ratio of each ``"token"``, or of the ``"sequence"``: the geometric
            mean over its tokens, clipped as one.
        correction: correction of a token outside cap and floor: weight 0 (``"mask"``; the
            denominator stays) or the weight clamped to them (``"truncate"``).
        rejection_level: cap and floor test each ``"token"``, the product over the ``"sequence"``,
            or its ``"geometric"`` mean; the last two mask the whole sequence. A kept token keeps
            its own weight: this is not Seq-MIS, which weighs all of a row by the product.
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
        kl_estimator: ``"k1"``, ``"k2"``, ``"k3"``, or ``"weighted_k3"``: exp(n - b) times k3, whose
            gradient is that of the KL; see :mod:`~sdp_lightning.objective.kl`.
        kl_in: whether the KL is a term of the ``"loss"`` or subtracted from the ``"reward"``.
        kl_tokens: tokens that the term of the loss sums over: those that are ``"kept"``, or
            ``"all"``. The denominator stays, and the reward's KL is over all.

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
    kl_estimator: Literal["k1", "k2", "k3", "weighted_k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_tokens: Literal["kept", "all"] = "kept"

    def __post_init__(self) -> None:
        check_types(self)
        if not self.has_own_surrogate:
            one_of("surrogate", self.surrogate, ("ppo", "cispo", "unclipped"))
        check_ranges(self)
        for reason in contradictions(self):
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
        """Whether the surrogate is the import path of a function."""
        return ":" in self.surrogate

    @property
    def has_bounds(self) -> bool:
        """Whether there is a cap or a floor."""
        return self.behavior_weight_cap is not None or self.behavior_weight_floor is not None
