"""Schedule-free SGD (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

BETA = 0.9


class ScheduleFreeSGD(torch.optim.Optimizer):
    """``z`` takes the steps, ``x`` is their mean, and gradients are taken at ``y`` between them.

    The parameters are y after ``train()`` and x after ``eval()``, as of the library schedulefree.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def train(self) -> None:
        self._move(lambda p, z: p.lerp_(z, 1 - BETA), to=True)

    def eval(self) -> None:
        self._move(lambda p, z: p.lerp_(z, 1 - 1 / BETA), to=False)

    @torch.no_grad()
    def _move(self, move: Callable[[Any, Any], object], *, to: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        move(p, self.state[p]["z"])
            group["train_mode"] = to

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    x = p.lerp(z, 1 - 1 / BETA)
                    z.sub_(p.grad, alpha=group["lr"])
                    p.copy_(x.lerp(z, 1 / group["k"]).lerp(z, 1 - BETA))
