"""Batches made by hand, models of other types, and their log-probs by transformers' own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdp_lightning.training.batch import Batch, Layout, collate
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
TOKENS = torch.tensor([[5, 9, 12, 7, 20, 3]])


def random_batch(seed: int, sizes: tuple[int, ...] = (3, 1, 4)) -> Batch:
    """Groups with a prompt each, several turns, several temperatures; rows of unlike length."""
    rng = np.random.default_rng(seed)
    groups: list[TrajectoryGroup] = []
    for size in sizes:
        prompt = rng.integers(3, 40, rng.integers(1, 8))
        members: list[Trajectory] = []
        for _ in range(size):
            parts: list[Context | Segment] = [Context(prompt)]
            for version in range(rng.integers(1, 4)):
                n = rng.integers(1, 5)
                tokens, logprobs = rng.integers(3, 40, n), -rng.random(n)
                parts.append(Segment(version, tokens, logprobs, 0.5 + 0.5 * version))
                if rng.random() < 0.5:
                    parts.append(Context(rng.integers(3, 40, 2)))
            members.append(Trajectory(tuple(parts)))
        groups.append(TrajectoryGroup(tuple(members)))
    return collate(groups, version=3)


def plain(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, T] log-probs and entropy, row by row, through the model's own head."""
    logprobs, entropy = (torch.zeros(batch.loss_mask.shape, dtype=model.dtype) for _ in range(2))
    for row, length in enumerate(batch.lengths.tolist()):
        logits = model(input_ids=batch.input_ids[row : row + 1, :length], use_cache=False).logits[0]
        for t in batch.loss_mask[row].nonzero()[:, 0].tolist():
            table = (logits[t - 1] / batch.temperatures[row, t]).log_softmax(-1)
            logprobs[row, t] = table[batch.input_ids[row, t]]
            entropy[row, t] = -(table.exp() * table).sum()
    return logprobs, entropy


def uneven_sum(logprobs: Tensor) -> Tensor:
    """A scalar in which no two tokens have the same weight."""
    slope = torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)
    return (logprobs * slope.to(logprobs.device)).sum()


def gradients(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    uneven_sum(logprobs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def build(kind: str, **settings: Any) -> Any:
    """A model of another type, as small as the tiny one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def logits(model: Any) -> Tensor:
    """[1, T, V] logits of ``TOKENS``."""
    with torch.no_grad():
        return model(TOKENS).logits
