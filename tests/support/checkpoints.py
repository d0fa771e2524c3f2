"""The state of an executor, written to a file and read again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from sdp_lightning.rollout.checkpoint.group_state import groups_as_dicts
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.types import TrajectoryGroup


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As Lightning's checkpoints go: only plain types survive ``weights_only``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def content(group: TrajectoryGroup) -> list[Any]:
    return [group.row_id, group.order, group.created_version] + [
        [
            t.reward,
            (t.rewards, t.reward_weights),
            t.finish_reason,
            t.token_ids.tolist(),
            [
                (s.version, s.logprobs.tolist(), s.temperature, s.kv_on_update, s.proximal.version)
                for s in t.segments
            ],
        ]
        for t in group.trajectories
    ]


def finished(executor: WorkflowExecutor) -> list[TrajectoryGroup]:
    return [g.finished for g in executor.registry.snapshot() if g.finished is not None]


def pending_in(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return groups_as_dicts(state["pending"], finished=True)


def running_in(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return groups_as_dicts(state["running"], finished=False)
