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
from sdp_lightning.training.batch.samples import one_row_a_sample, tokens_of_samples

__all__ = [
    "NO_VERSION",
    "AttentionCosts",
    "Batch",
    "Layout",
    "SealedBatch",
    "blank_batch",
    "collate",
    "one_row_a_sample",
    "pack_microbatches",
    "pad_microbatches",
    "share_microbatches",
    "split_minibatches",
    "tokens_of_samples",
    "trial_batch",
]
