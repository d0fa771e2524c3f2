"""Warnings of Lightning and torch that say nothing to users of this package, turned off."""

from __future__ import annotations

import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

_MESSAGES = (
    # Lightning 2.6 calls torch 2.13 in a deprecated way.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The policy trains in eval mode: see training/policy/loading.py, disable_noise().
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Lightning recommends saving the weights from before the step. A resume needs those after it,
    # with the version that was published for them.
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",
)


def ignore_known_warnings(trainer: L.Trainer) -> None:
    """Turn the warnings off in this process.

    :meth:`SegmentWisePPOModule.setup` calls this, so importing the package changes no filter.

    Lightning sets DDP up on a CUDA stream of its own, so torch would warn in a backward pass that
    it synchronizes two streams. That costs one synchronization and changes no number.
    """
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy.root_device.type == "cuda":
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
