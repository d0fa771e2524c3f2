"""Modules with optimizers and schedules of a user's own."""

from __future__ import annotations

from typing import Any

import torch

import sdp_lightning as sdp


class WithOwn(sdp.SegmentWisePPOModule):
    """A module whose ``configure_optimizers`` is ``make`` of its parameters."""

    make: Any

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def muon_and_adamw(parameters: Any) -> Any:
    """Matrices by Muon, the rest by AdamW, with a schedule each."""
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(rest, lr=0.5)]
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    return optimizers, [rates[0], {"scheduler": rates[1], "interval": "step", "frequency": 2}]


class Heard(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """A plateau schedule that keeps what it was told."""

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.heard = [*getattr(self, "heard", []), float(metrics)]
        super().step(metrics)


def plateau(monitor: str | None, **settings: Any) -> Any:
    def make(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        heard = Heard(optimizer, mode="max", patience=0, factor=0.5, threshold=100.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": heard} | settings} | (
            {} if monitor is None else {"monitor": monitor}
        )

    return make
