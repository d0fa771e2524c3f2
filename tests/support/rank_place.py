"""What every training case on several ranks shares: its place, strategy, weights and module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import peft  # noqa: F401  (loaded here, once)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (loaded here, once)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

import sdp_lightning as sdp
from sdp_lightning.types import Trajectory


@dataclass(frozen=True)
class Place:
    """Where a case runs: the tiny model's folder, and this process among how many."""

    folder: str
    rank: int
    size: int


def make_strategy(name: str, size: int) -> Any:
    """ "fsdp" writes one file, "fsdp shards" a folder."""
    if name.startswith("fsdp"):
        return ModelParallelStrategy(
            data_parallel_size=size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=name == "fsdp shards",
        )
    return "auto" if size == 1 else name


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def weights_of(module: sdp.SegmentWisePPOModule) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in module.require_policy().state_dict().items()}


class Metrics(Callback):
    """What was logged, step by step. Goes last."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class CountingModule(sdp.SegmentWisePPOModule):
    """Counts what it scores."""

    num_calls = num_scored = 0

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        if trajectories:
            self.num_scored += len(trajectories)
        self.num_calls += 1
        return super().score(trajectories)
