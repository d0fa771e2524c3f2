"""Conversion between trajectories and the rows of a scored batch. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sdp_lightning.types import FloatArray, Segment, Trajectory, TrajectoryGroup


def group_by_prompt(
    trajectories: Sequence[Trajectory],
) -> tuple[list[TrajectoryGroup], list[int]]:
    """Groups trajectories by their first context, so that it is computed once.

    Returns:
        The groups, and the row of each trajectory in their collated batch.
    """
    members: dict[bytes, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        members.setdefault(trajectory.parts[0].token_ids.tobytes(), []).append(index)
    order = [index for indices in members.values() for index in indices]
    groups = [TrajectoryGroup(tuple(trajectories[i] for i in ids)) for ids in members.values()]
    rows = [0] * len(order)
    for row, index in enumerate(order):
        rows[index] = row
    return groups, rows


def split_by_segment(
    trajectories: Sequence[Trajectory], logprobs: Tensor
) -> list[list[FloatArray]]:
    """Splits ``logprobs`` [B, T] (CPU) into one ``[n]`` array per segment of each trajectory."""
    table = logprobs.float().numpy()
    result: list[list[FloatArray]] = []
    for row, trajectory in enumerate(trajectories):
        pieces: list[FloatArray] = []
        start = 0
        for part in trajectory.parts:
            end = start + int(part.token_ids.size)
            if isinstance(part, Segment):
                pieces.append(np.array(table[row, start:end], dtype=np.float32))
            start = end
        result.append(pieces)
    return result
