"""The methods that are compared: settings of the library, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdp_lightning.config import LossConfig


@dataclass(frozen=True)
class Method:
    """One way to learn from old samples.

    Args:
        loss: the estimator.
        scale_lr_by_ess: as :class:`~sdp_lightning.config.OptimizerConfig` has it.
        corrected: False takes the samples for fresh ones: b is replaced by x.
        least_ess: the exponent of the bridge is chosen for each batch so that the effective sample
            size, as a share of its tokens, stays above this; None leaves it.
    """

    loss: LossConfig
    scale_lr_by_ess: bool = False
    corrected: bool = True
    least_ess: float | None = None

    def kind(self, lag: int) -> Method | tuple[object, ...]:
        """What it shares with all methods that are the same at this lag.

        Without staleness x = q = b, and only the surrogate and its clip are left. At lag 1 q = x:
        the centres q and x are one, and there is no bridge; the centre "past" is b.
        """
        loss = self.loss
        if lag == 0:
            return loss.surrogate, loss.clip_epsilon, loss.clip_epsilon_high
        if lag == 1 and loss.trust_region == "past":
            return replace(self, loss=replace(loss, trust_region="behavior"))
        if lag == 1 and loss.trust_region != "behavior":
            plain = replace(
                loss,
                trust_region="proximal",
                bridge_exponent=1.0,
                bridge_cap=None,
                segment_proximal="scored",
            )
            return replace(self, loss=plain, least_ess=None)
        return self


DEFAULT = "segment"
METHODS = {
    "segment": Method(LossConfig(trust_region="segment")),
    "behavior": Method(LossConfig(trust_region="behavior")),
    "past": Method(LossConfig(trust_region="past")),
    "proximal": Method(LossConfig(trust_region="proximal")),
    "proximal, behavior mask": Method(LossConfig(trust_region="proximal", behavior_mask=True)),
    "origin": Method(
        LossConfig(trust_region="proximal", bridge_exponent=0.0, rejection_on="weight")
    ),
    "bridge^0": Method(LossConfig(trust_region="proximal", bridge_exponent=0.0)),
    "bridge^0.5": Method(LossConfig(trust_region="proximal", bridge_exponent=0.5)),
    "bridge cap 2": Method(LossConfig(trust_region="proximal", bridge_cap=2.0)),
    "segment, log-linear q": Method(
        LossConfig(trust_region="segment", segment_proximal="loglinear")
    ),
    "proximal, log-linear x": Method(LossConfig(trust_region="proximal", proximal="loglinear")),
    "TIS": Method(
        LossConfig(
            trust_region="proximal",
            correction="truncate",
            rejection_on="weight",
            behavior_weight_cap=2.0,
        )
    ),
    "CISPO": Method(LossConfig(trust_region="behavior", surrogate="cispo")),
    "M2PO": Method(
        LossConfig(trust_region="behavior", surrogate="unclipped", second_moment_cap=0.04)
    ),
    "segment, ESS rate": Method(LossConfig(trust_region="segment"), scale_lr_by_ess=True),
    "uncorrected": Method(LossConfig(trust_region="behavior"), corrected=False),
    "behavior, clip 0.3": Method(LossConfig(trust_region="behavior", clip_epsilon=0.3)),
    "behavior, clip 0.4": Method(LossConfig(trust_region="behavior", clip_epsilon=0.4)),
    "log-linear q, ESS rate": Method(
        LossConfig(trust_region="segment", segment_proximal="loglinear"), scale_lr_by_ess=True
    ),
    "behavior 0.3, ESS rate": Method(
        LossConfig(trust_region="behavior", clip_epsilon=0.3), scale_lr_by_ess=True
    ),
}
ON_REAL_MODELS = METHODS | {
    "bridge^0.25": Method(LossConfig(trust_region="proximal", bridge_exponent=0.25)),
    "bridge^0.75": Method(LossConfig(trust_region="proximal", bridge_exponent=0.75)),
    "tempered bridge": Method(
        LossConfig(trust_region="proximal", bridge_exponent=0.5), least_ess=0.95
    ),
}
