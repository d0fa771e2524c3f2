"""AdamW on the CPU takes the fused step, which is the same step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdp_lightning.config import OptimizerConfig
from sdp_lightning.training.policy.optimizer import make_optimizer

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def steps(module: nn.Module, optimizer: Any, count: int) -> torch.Tensor:
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.arange(12.0).view(3, 4)).square().sum().backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 5)


def test_the_fused_step_is_the_step_and_goes_on_from_one_that_was_not_fused() -> None:
    ours, plain = linear(), linear()
    optimizer, _ = make_optimizer(ours.parameters(), CONFIG, max_steps=None)
    assert optimizer.param_groups[0]["fused"] is True
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=CONFIG.betas, weight_decay=0.1)
    torch.testing.assert_close(steps(ours, optimizer, 3), steps(plain, reference, 3))
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))  # of a run before
    torch.testing.assert_close(steps(ours, optimizer, 3), steps(plain, reference, 3))


def test_parameters_elsewhere_and_other_optimizers_are_left_alone() -> None:
    away = nn.Linear(4, 5, device="meta")
    assert not make_optimizer(away.parameters(), CONFIG, max_steps=None)[0].param_groups[0]["fused"]
    sgd = OptimizerConfig(class_path="torch.optim.SGD", init_args={"lr": 0.1})
    made, _ = make_optimizer(linear().parameters(), sgd, max_steps=None)
    assert made.param_groups[0].get("fused") is None
