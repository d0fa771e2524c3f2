"""One optimizer step: gradients are clipped, and a step with non-finite ones is skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdp_lightning.errors import SDPError


def clip_gradients(optimizer: Any, limit: float | None) -> Tensor:
    """Clips the gradients that are stepped with to ``limit``, and returns their norm before that.

    The norm is over all ranks.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@dataclass
class GradientStep:
    """Clips the gradient and steps, or skips the step if it is not finite.

    Args:
        limit: largest norm of the gradient; None is off.
        max_skipped: number of steps skipped in a row that is an error.
        num_skipped: steps skipped in a row so far.
    """

    limit: float | None
    max_skipped: int
    num_skipped: int = 0

    def __call__(self, optimizer: Any, schedule: Any, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Step, and return ``grad_norm``, the applied ``lr``, and ``skipped`` (0 or 1), each [].

        Args:
            optimizer: optimizer of parameters with gradients.
            schedule: sets the learning rates, if there is one; advanced unless the step is skipped.
            scale: factor of the learning rates in this step only.

        Raises:
            SDPError: after ``max_skipped`` skipped steps in a row.
        """
        norm = clip_gradients(optimizer, self.limit)
        rates = [group["lr"] for group in optimizer.param_groups]
        self.num_skipped = 0 if torch.isfinite(norm) else self.num_skipped + 1
        if self.num_skipped == 0:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if schedule is not None:
                schedule.step()
        elif self.num_skipped >= self.max_skipped:
            raise SDPError(
                f"the gradient was not finite (norm {norm}) in {self.num_skipped} optimizer steps "
                "in a row. Lower the learning rate, or look at the rewards and log-probs."
            )
        values = float(rates[0]) * scale, float(self.num_skipped > 0)
        rate, skipped = torch.tensor(values, dtype=torch.float32)  # not the default type
        return {"grad_norm": norm.float(), "lr": rate, "skipped": skipped}
