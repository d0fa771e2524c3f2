"""Updates of servers over any transport, and the files of a weight folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.weights.protocol import Weights, WeightTransport


def update(
    engine: RemoteInfEngine,
    named: list[tuple[str, torch.Tensor]],
    version: int,
    *,
    reset: bool = False,
) -> Any:
    engine.pause()
    report = engine.update_weights(named, version, reset=reset)
    engine.resume()
    return report


def stage(transport: WeightTransport, named: Weights, *, full: bool) -> int:
    """Stage weights and put them in force; returns their bytes."""
    num_bytes = transport.stage(named, full=full)
    transport.activate()
    return num_bytes


def load(folder: Path) -> dict[str, list[float]]:
    return {k: v.tolist() for k, v in load_file(folder / "model-00000.safetensors").items()}


def names_in(folder: Path) -> list[str]:
    """Names of the files in ``folder`` other than the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")
