"""Cores for an engine that samples in the trainer's process."""

from __future__ import annotations

import os
import sys

import torch

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import InferenceEngine


def leave_cores(engine: InferenceEngine) -> int | None:
    """Leave an embedded engine its cores: on shared ones two OpenMP pools spin against each other.

    Returns:
        How many threads torch had before, to be given back; None if that was not changed.
    """
    if not isinstance(engine, EmbeddedEngine) or "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share, threads = max(1, cores - engine.num_cpu_threads), torch.get_num_threads()
    if not engine.num_cpu_threads or share >= threads:
        return None
    torch.set_num_threads(share)
    return threads
