"""Batches: groups of trajectories as tensors, and their minibatches and micro-batches."""

from sdp_lightning.training.batch.batch import NO_VERSION, Batch, Layout, SealedBatch
from sdp_lightning.training.batch.collate import blank_batch, collate, trial_batch
from sdp_lightning.training.batch.microbatches import (
    AttentionCosts,
    pack_microbatches,
    pad_microbatches,
    share_microbatches,
    split_minibatches,
)

__all__ = [
    "NO_VERSION",
    "AttentionCosts",
    "Batch",
    "Layout",
    "SealedBatch",
    "blank_batch",
    "collate",
    "pack_microbatches",
    "pad_microbatches",
    "share_microbatches",
    "split_minibatches",
    "trial_batch",
]
