"""Groups in a checkpoint, finished or not: tensors, numbers, strings, lists and dicts only.

:func:`~sdp_lightning.rollout.checkpoint.packed_groups.pack_groups` writes them. Here is the form of
earlier versions, a dict for each group with tensors of its own, which is still read, and in which
groups are dealt out to another number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sdp_lightning.rollout.checkpoint.packed_groups import unpack_groups
from sdp_lightning.rollout.checkpoint.saved_group import SavedGroup, SavedResult
from sdp_lightning.rollout.checkpoint.segment_codec import (
    params_to_fields,
    part_from_fields,
    part_to_fields,
)
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.episode_log import CallEnd, CallStart, Event

GroupStates = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # packed, or a dict for each


def read_groups(state: GroupStates, *, finished: bool) -> list[SavedGroup]:
    """The groups of a checkpoint, in either form.

    Raises:
        CheckpointError: if the parts of the packed form do not fit each other.
        VersionError: if a version makes no sense in the form of earlier versions.
        RolloutError: if tokens or log-probs make no sense.
    """
    if isinstance(state, Mapping):
        return unpack_groups(state, finished=finished)
    return [group_from_dict(group) for group in state]


def groups_as_dicts(state: GroupStates, *, finished: bool) -> list[Mapping[str, Any]]:
    """The groups of a checkpoint, a dict for each; raises as :func:`read_groups` does."""
    if not isinstance(state, Mapping):
        return list(state)
    return [group_to_dict(group) for group in unpack_groups(state, finished=finished)]


def num_groups(state: GroupStates) -> int:
    """How many groups a checkpoint holds, in either form."""
    return len(state["row_ids"] if isinstance(state, Mapping) else state)


def group_to_dict(group: SavedGroup) -> dict[str, Any]:
    """The trajectories of a finished group, the logs of one that is under way."""
    place = {
        "epoch": group.epoch,
        "index": group.index,
        "row_id": group.row_id,
        "order": group.order,
        "created_version": group.created_version,
    }
    logs = [[_event_to_state(event) for event in log] for log in group.logs]
    if group.results is None:
        return place | {"logs": logs}
    return place | {
        "trajectories": [
            {**_result_to_state(result), "parts": parts}
            for parts, result in zip(logs, group.results, strict=True)
        ],
    }


def group_from_dict(state: Mapping[str, Any]) -> SavedGroup:
    """The group that :func:`group_to_dict` wrote."""
    trajectories = state.get("trajectories")
    logs = state["logs"] if trajectories is None else [t["parts"] for t in trajectories]
    return SavedGroup(
        epoch=int(state["epoch"]),
        index=int(state["index"]),
        row_id=state["row_id"],
        order=int(state["order"]),
        created_version=int(state["created_version"]),
        logs=[[_event_from_state(event) for event in log] for log in logs],
        results=None
        if trajectories is None
        else [
            SavedResult(**{name: t[name] for name in SavedResult._fields if name in t})
            for t in trajectories
        ],
    )


def _result_to_state(result: SavedResult) -> dict[str, Any]:
    state: dict[str, Any] = {"reward": result.reward, "finish_reason": result.finish_reason}
    if not result.rewards:
        return state
    weights = dict(result.reward_weights)
    return state | {"rewards": dict(result.rewards), "reward_weights": weights}


def _event_to_state(event: Event) -> dict[str, Any]:
    if isinstance(event, CallStart):
        return {"params": params_to_fields(event.params)}
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
