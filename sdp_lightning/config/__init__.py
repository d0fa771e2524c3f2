"""Settings: frozen, validated when made, picklable.

Each class is one concern. A setting that is out of range, or contradicts another one of its class,
raises ``ConfigError`` with the value and the remedy; ``together`` does so for several classes.
"""

from sdp_lightning.config.lora import LoRAConfig
from sdp_lightning.config.loss import LossConfig, TrustRegion
from sdp_lightning.config.rollout import LONGEST_S, MissingProximal, OnOverdue, RolloutConfig
from sdp_lightning.config.update import OptimizerConfig, UpdateConfig

__all__ = [
    "LONGEST_S",
    "LoRAConfig",
    "LossConfig",
    "MissingProximal",
    "OnOverdue",
    "OptimizerConfig",
    "RolloutConfig",
    "TrustRegion",
    "UpdateConfig",
]
