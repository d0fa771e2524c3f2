"""Metrics of a training step by lag: sums that are exact over micro-batches and ranks.

``names`` lists what is logged and what it means, ``sums`` adds up and divides (pure functions),
``lag_metrics`` holds the sums between micro-batches, ``health`` warns of values beyond a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdp_lightning.training.metrics.health import HealthLog, HealthWarning, health_warnings
from sdp_lightning.training.metrics.names import FAMILIES, Family, all_names

if TYPE_CHECKING:
    from sdp_lightning.training.metrics.lag_metrics import LagMetrics

__all__ = [
    "FAMILIES",
    "Family",
    "HealthLog",
    "HealthWarning",
    "LagMetrics",
    "all_names",
    "health_warnings",
]


def __getattr__(name: str) -> Any:
    """Loads ``LagMetrics`` on first use: it needs torch, and readers of metrics do not."""
    if name == "LagMetrics":
        from sdp_lightning.training.metrics.lag_metrics import LagMetrics

        return LagMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
