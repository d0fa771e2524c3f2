"""Rollouts that can be checked after a kill, and the journal of a run that may be killed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.types import Context, Row, SamplingParams, Segment, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession
from support.checkpoints import pending_in, running_in
from support.trainers import executor_of

STEPS, NUM_ROWS, BATCH_SIZE = 8, 60, 2  # groups a rank


def make_rows() -> list[dict[str, Any]]:
    """Every 9th row is rejected, every 13th fails; they differ in turns and in length."""
    return [
        {"id": f"row{i}", "n": i, "turns": 1 + i % 3, "tokens": 2 + 5 * i % 11}
        for i in range(NUM_ROWS)
    ]


class Turns(sdp.RolloutWorkflow):
    """Two samples at once, of ``turns`` turns of ``tokens`` tokens each."""

    sampling = SamplingParams(max_new_tokens=2)

    async def run(self, row: Row, session: RolloutSession) -> list[Trajectory] | None:
        episodes = [session.open() for _ in range(2)]
        await asyncio.gather(*(self.sample(row, episode) for episode in episodes))
        if row["n"] % 13 == 5:
            raise ValueError("this row fails")
        return None if row["n"] % 9 == 4 else [e.finish(row["n"] % 2) for e in episodes]

    async def sample(self, row: Row, episode: sdp.Episode) -> None:
        for turn in range(row["turns"]):
            episode.add_context([3 + row["n"] % 40, 4 + turn])
            await episode.generate(SamplingParams(max_new_tokens=row["tokens"]))


def expected_length(row: Mapping[str, Any]) -> int:
    return row["turns"] * (2 + row["tokens"])


class Journal(Callback):
    """What happened, in a file that outlives the process. Goes last, but before the checkpoint.

    A kill may cut a line where a page of the file ends. Such an entry is taken off: what it tells
    of was not done yet.
    """

    def __init__(self, path: Path, came_back: Mapping[str, int]) -> None:
        self._came_back = came_back
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        written = os.pread(self._file, os.fstat(self._file).st_size, 0)
        os.ftruncate(self._file, written.rfind(b"\n") + 1)

    def write(self, **entry: Any) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())
        os.fsync(self._file)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        executor = executor_of(trainer)
        self.write(kind="start", version=executor.version, **self._came_back)
        self._count_with_state(executor)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor = executor_of(trainer)
        groups = [g.finished for g in executor.registry.snapshot() if g.in_training and g.finished]
        masks = executor.config.on_overdue == "mask"
        heads = [g.tail_version if masks else g.head_version for g in groups]
        stat = executor.stat
        ended = stat.pending + stat.consumed + stat.dropped + stat.rejected + stat.failed
        self.write(
            kind="step",
            version=executor.version,
            rows=[g.row_id for g in groups],
            lag=max(executor.version - (v or 0) for v in heads),
            length={g.row_id: [t.num_tokens for t in g.trajectories] for g in groups},
            is_right=all(is_right(t) for g in groups for t in g.trajectories),
            is_conserved=stat.submitted == stat.running + ended,
        )

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        executor = executor_of(trainer)
        states = checkpoint.get(type(trainer.datamodule).__qualname__, {}).get("ranks", [])
        if not states:  # rank 0 saves what all have
            return
        self.write(
            kind="saving",
            version=executor.version,
            step=trainer.global_step,
            lost=sum(state["lost"] for state in states),
            diverged=executor.telemetry.num_diverged,
            live=[row for state in states for row in live_rows(state, len(states))],
        )

    def _count_with_state(self, executor: Any) -> None:
        """Rollouts go on after the state is taken: what it lacks is counted at the same moment."""
        take_state = executor.state_dict

        def state_dict() -> dict[str, Any]:
            with executor.registry.changed:
                stat = executor.stat
                lost = stat.dropped + stat.rejected + stat.failed
                return take_state() | {"lost": lost}

        executor.state_dict = state_dict


def is_right(trajectory: Trajectory) -> bool:
    """The fake engine's token at position p is p % 7 + 3, its log-prob says the version."""
    position = 0
    for part in trajectory.parts:
        if isinstance(part, Segment):
            places = range(position, position + len(part))
            if part.token_ids.tolist() != [p % 7 + 3 for p in places]:
                return False
            if abs(part.logprobs + (part.version + 1) / 10).max() > 1e-6:
                return False
        position += len(part.token_ids)
    return isinstance(trajectory.parts[0], Context)


def live_rows(state: Mapping[str, Any], num_ranks: int) -> list[str]:
    """Every row that a state of a rank's executor still has before it, with repetitions."""
    stream = state["prompts"]
    place = stream["position"] if stream["epoch"] == 0 else NUM_ROWS
    order = list(range(place, NUM_ROWS, num_ranks))
    waiting = [index for _, index in stream["returned"]] + order
    groups = [*pending_in(state), *running_in(state)]
    return [f"row{i}" for i in waiting] + [group["row_id"] for group in groups]
