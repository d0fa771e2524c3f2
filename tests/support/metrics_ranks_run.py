"""Ranks of a gloo group: each adds its rows to ``LagMetrics``, reduces, writes what it computes.

They meet and write in a folder. Rank r has every row i of each step with i % ranks == r, one
micro-batch a row. Ranks are forked, before any tensor operation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed

from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.objective.effective_sample_size import effective_share
from sdp_lightning.training.metrics import LagMetrics
from sdp_lightning.training.metrics.sums import drift_moments
from support.metrics_oracle import Step

SEEDS = (11, 12, 13)
DRIFTS = (0.05, 0.8, 6.0)


def make_steps() -> list[Step]:
    return [Step.random(s, rows=5, drift=d) for s, d in zip(SEEDS, DRIFTS, strict=True)]


def rows_of(rank: int, size: int, step: Step) -> list[Step]:
    return [step.select([row]) for row in range(rank, len(step.batch), size)]


def be_rank(rank: int, size: int, folder: Path) -> None:
    meet = f"file://{folder / 'meet'}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    sums = RankSums(torch.device("cpu"), rank, size)
    pooled, synced, calls = LagMetrics(sync_on_compute=False), LagMetrics(), [0]
    moments = torch.zeros(3, dtype=torch.float64)
    for step in make_steps():
        for part in rows_of(rank, size, step):
            moments += drift_moments(part.batch, part.proximal)
            part.add_to(pooled)
            part.add_to(synced)

    def counted(add_up: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(tensor: Tensor) -> Tensor:
            calls[0] += 1
            return add_up(tensor)

        return call

    share = effective_share(*sums.add_up(moments))
    other = torch.tensor([rank + 1.0], dtype=torch.float64)
    found = pooled.pool(counted(sums.add_up), other, rank=rank, num_ranks=size)
    result = {
        "pool": {name: float(value) for name, value in pooled.compute().items()},
        "torchmetrics": {name: float(value) for name, value in synced.compute().items()},
        "other": found.tolist(),
        "all_reduces": calls[0],
        "effective share": float(share),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


def main(size: int, place: str) -> None:
    folder = Path(place)
    torch.set_num_threads(1)
    forked: list[int] = []
    for rank in range(1, size):
        if (pid := os.fork()) == 0:
            be_rank(rank, size, folder)
            return
        forked.append(pid)
    be_rank(0, size, folder)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in forked)
