"""From groups of trajectories to tensors, and how to cut those into pieces that fit."""

from sdp_lightning.batch.collate import collate
from sdp_lightning.batch.data import NO_VERSION, Batch, Layout, SealedBatch
from sdp_lightning.batch.plan import plan_microbatches, split_minibatches

__all__ = [
    "NO_VERSION",
    "Batch",
    "Layout",
    "SealedBatch",
    "collate",
    "plan_microbatches",
    "split_minibatches",
]
