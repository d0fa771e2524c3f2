"""Groups in a checkpoint, finished or not: tensors, numbers, strings, lists and dicts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from sdp_lightning.rollout.checkpoint.segment_codec import part_from_fields, part_to_fields
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.types import SamplingParams, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.episode_log import CallEnd, CallStart, Event, log_parts


def group_to_state(group: InFlightGroup) -> dict[str, Any]:
    """The state of a group: trajectories if it is finished, else the logs of its episodes."""
    identity = {
        "epoch": group.row.epoch,
        "index": group.row.index,
        "row_id": group.row.row_id,
        "order": group.order,
        "created_version": group.created_version,
    }
    if group.finished is None:
        return identity | {
            "logs": [[_event_to_state(e) for e in log] for log in group.session.logs]
        }
    return identity | {
        "trajectories": [
            {
                "reward": t.reward,
                "finish_reason": t.finish_reason,
                "parts": [_event_to_state(part) for part in t.parts],
            }
            for t in group.finished.trajectories
        ],
    }


def group_from_state(state: Mapping[str, Any]) -> TrajectoryGroup:
    """The finished group that :func:`group_to_state` wrote, with the proximals it had."""
    return TrajectoryGroup(
        tuple(
            Trajectory(
                log_parts(_event_from_state(part) for part in t["parts"]),
                reward=t["reward"],
                finish_reason=t["finish_reason"],
            )
            for t in state["trajectories"]
        ),
        row_id=state["row_id"],
        order=state["order"],
        created_version=state["created_version"],
    )


def logs_from_state(state: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Event]]:
    """The logs that :func:`group_to_state` wrote, for episodes to restore."""
    return [[_event_from_state(event) for event in log] for log in state]


def _event_to_state(event: Event) -> dict[str, Any]:
    if isinstance(event, CallStart):
        params = asdict(event.params)
        return {"params": params | {"stop_token_ids": list(event.params.stop_token_ids)}}
    if isinstance(event, CallEnd):
        return {"finish_reason": event.finish_reason}
    return {
        name: torch.tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in part_to_fields(event).items()
    }


def _event_from_state(state: Mapping[str, Any]) -> Event:
    if "params" in state:
        return CallStart(SamplingParams(**state["params"]))
    if "finish_reason" in state:
        return CallEnd(state["finish_reason"])
    return part_from_fields(
        {
            name: value.numpy() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
    )
