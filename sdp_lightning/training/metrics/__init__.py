"""What a training step did to tokens of every lag: sums that are exact over pieces and ranks.

``names`` says what is logged and what it means, ``sums`` adds up and divides (pure functions),
``lag`` holds the sums between micro-batches, ``verdicts`` says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdp_lightning.training.metrics.health import Verdict, Warner, verdicts
from sdp_lightning.training.metrics.names import FAMILIES, Family, all_names

if TYPE_CHECKING:
    from sdp_lightning.training.metrics.lag_metrics import LagMetrics

__all__ = ["FAMILIES", "Family", "LagMetrics", "Verdict", "Warner", "all_names", "verdicts"]


def __getattr__(name: str) -> Any:
    """``LagMetrics`` needs torch: who only reads metrics does not load it."""
    if name == "LagMetrics":
        from sdp_lightning.training.metrics.lag_metrics import LagMetrics

        return LagMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
