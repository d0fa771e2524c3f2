"""Finished groups in a checkpoint: tensors, numbers, strings, lists and dicts only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdp_lightning.rollout.prompts import PromptRow
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup


def group_to_state(group: TrajectoryGroup, row: PromptRow) -> dict[str, Any]:
    """A finished group in tensors, numbers, strings, lists and dicts."""
    return {
        "epoch": row.epoch,
        "index": row.index,
        "row_id": group.row_id,
        "order": group.order,
        "created_version": group.created_version,
        "trajectories": [
            {
                "reward": t.reward,
                "finish_reason": t.finish_reason,
                "parts": [_part_to_state(part) for part in t.parts],
            }
            for t in group.trajectories
        ],
    }


def group_from_state(state: Mapping[str, Any]) -> TrajectoryGroup:
    """The group that :func:`group_to_state` wrote, with the proximals it had."""
    return TrajectoryGroup(
        tuple(
            Trajectory(
                tuple(_part_from_state(part) for part in t["parts"]),
                reward=t["reward"],
                finish_reason=t["finish_reason"],
            )
            for t in state["trajectories"]
        ),
        row_id=state["row_id"],
        order=state["order"],
        created_version=state["created_version"],
    )


def _part_to_state(part: Context | Segment) -> dict[str, Any]:
    tokens = torch.tensor(part.token_ids)
    if isinstance(part, Context):
        return {"token_ids": tokens}
    scored = part.proximal.logprobs
    return {
        "token_ids": tokens,
        "version": part.version,
        "logprobs": torch.tensor(part.logprobs),
        "temperature": part.temperature,
        "kv_on_update": part.kv_on_update,
        "proximal": None if scored is None else torch.tensor(scored),
        "proximal_version": part.proximal.version,
    }


def _part_from_state(state: Mapping[str, Any]) -> Context | Segment:
    tokens = state["token_ids"].numpy()
    if "version" not in state:
        return Context(tokens)
    segment = Segment(
        state["version"],
        tokens,
        state["logprobs"].numpy(),
        temperature=state["temperature"],
        kv_on_update=state["kv_on_update"],
    )
    if state["proximal"] is not None:
        segment.proximal.set(state["proximal"].numpy(), state["proximal_version"])
    return segment
