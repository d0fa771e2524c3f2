"""A tiny model with a LoRA adapter, and the engine's log-probs beside its own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.policy.lora import add_adapter, is_adapter
from support.steps import plain_logprobs

LORA = sdp.LoRAConfig(rank=4, alpha=8.0)


def adapted(lora: sdp.LoRAConfig = LORA, *, seed: int = 3, **settings: Any) -> Any:
    """A tiny model with an adapter that does something."""
    model = tiny_model(**settings)
    add_adapter(model, lora)
    shake(model, seed)
    return model


@torch.no_grad()
def shake(model: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


class Compare(Callback):
    """How far the engine's log-probs are from transformers' own forward of the trained policy."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        expected = plain_logprobs(pl_module.require_policy(), batch).detach()
        assert (batch.lags[batch.loss_mask] == 0).all()
        self.errors.append(float((expected - batch.behavior_logprobs).abs().max()))
