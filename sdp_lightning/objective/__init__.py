"""The mathematics of the update: pure functions on tensors, no state, no I/O.

Everything is in nats and at least float32. Letters: b behavior, q segment proximal, x proximal,
n target, m centre of the trust region.
"""

from sdp_lightning.objective.advantages import group_relative_advantages
from sdp_lightning.objective.corrections import complete_segment_logprobs
from sdp_lightning.objective.logprobs import token_logprobs
from sdp_lightning.objective.losses import PolicyLoss, segment_wise_ppo_loss

__all__ = [
    "PolicyLoss",
    "complete_segment_logprobs",
    "group_relative_advantages",
    "segment_wise_ppo_loss",
    "token_logprobs",
]
