"""The mathematics of the update: pure functions on tensors, no state, no I/O.

Everything is in nats and at least float32. Letters: b behavior, q segment proximal, x proximal,
n target, m centre of the trust region.
"""

from sdp_lightning.objective.advantages import (
    batch_normalized,
    decoupled_sums,
    group_relative_advantages,
    leave_one_out_advantages,
)
from sdp_lightning.objective.aggregation import loss_denominator
from sdp_lightning.objective.loss import PolicyLoss, segment_wise_ppo_loss
from sdp_lightning.objective.rejection import (
    second_moment_bound,
    second_moment_set,
    within_second_moment,
)
from sdp_lightning.objective.segment_proximal import (
    complete_segment_logprobs,
    loglinear_proximal,
    loglinear_segment,
)
from sdp_lightning.objective.token_logprobs import token_logprobs

__all__ = [
    "PolicyLoss",
    "batch_normalized",
    "complete_segment_logprobs",
    "decoupled_sums",
    "group_relative_advantages",
    "leave_one_out_advantages",
    "loglinear_proximal",
    "loglinear_segment",
    "loss_denominator",
    "second_moment_bound",
    "second_moment_set",
    "segment_wise_ppo_loss",
    "token_logprobs",
    "within_second_moment",
]
