"""Settings of different classes that contradict each other."""

from __future__ import annotations

from sdp_lightning.config.loss import LossConfig
from sdp_lightning.config.rollout import RolloutConfig
from sdp_lightning.config.update import UpdateConfig
from sdp_lightning.errors import ConfigError


def check_together(rollout: RolloutConfig, update: UpdateConfig, loss: LossConfig) -> None:
    """Refuse settings that together train nothing, or something else than they say.

    Args:
        rollout: one rank's share.
        update: the module's setting.
        loss: the module's setting.

    Raises:
        ConfigError: naming both settings, and what to set instead.
    """
    if update.num_minibatches > rollout.batch_size:
        raise ConfigError(
            f"batch_size={rollout.batch_size} groups a process cannot fill "
            f"num_minibatches={update.num_minibatches}: groups stay whole."
        )
    drops = rollout.enable_segment_wise_ppo and rollout.missing_proximal == "drop"
    if drops and not loss.needs_segment_scores:
        raise ConfigError(
            "missing_proximal='drop' drops every group older than 1 version, because the "
            f"estimator (trust_region={loss.trust_region!r}) never has segments scored. "
            "Use another missing_proximal, or trust_region='segment'."
        )
    check_centre(loss, segment_wise=rollout.enable_segment_wise_ppo)


def check_objective(update: UpdateConfig, loss: LossConfig) -> None:
    """Refuse advantages that ``loss`` has no reward for.

    Raises:
        ConfigError: naming both settings, and what to set instead.
    """
    if update.advantages == "gdpo" and loss.needs_reference and loss.kl_in == "reward":
        raise ConfigError(
            "advantages='gdpo' normalizes each named reward apart, and kl_in='reward' takes the KL "
            "off their sum. Use kl_in='loss'."
        )


def check_centre(loss: LossConfig, *, segment_wise: bool) -> None:
    """Refuse a centre that needs the segment-wise mode while it is off.

    Raises:
        ConfigError: naming both settings, and what to set instead.
    """
    if loss.trust_region == "past" and not segment_wise:
        raise ConfigError(
            "trust_region='past' with enable_segment_wise_ppo=False: the mode without segments is "
            "decoupled PPO, whose centre is x at every lag, also at lag 1. Use "
            "trust_region='proximal', or leave enable_segment_wise_ppo on."
        )
