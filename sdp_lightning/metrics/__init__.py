"""What a training step did to tokens of every lag: sums that are exact over pieces and ranks.

``names`` says what is logged and what it means, ``sums`` adds up and divides (pure functions),
``lag`` holds the sums between micro-batches, ``verdicts`` says what is wrong.
"""

from sdp_lightning.metrics.lag import LagMetrics
from sdp_lightning.metrics.names import FAMILIES, Family, all_names
from sdp_lightning.metrics.verdicts import Verdict, Warner, verdicts

__all__ = ["FAMILIES", "Family", "LagMetrics", "Verdict", "Warner", "all_names", "verdicts"]
