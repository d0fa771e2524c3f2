"""Scores segments at the one moment when their segment proximal policy exists.

At step c the trainer holds version c, the segment proximal policy of the tokens of version c - 1.
Those that are not trained in this step must be scored now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdp_lightning.errors import RolloutError
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.types import Context, FloatArray, Segment, Trajectory


class LogprobScorer(Protocol):
    """Scores sampled tokens under the weights that the trainer holds.

    It computes no gradient and uses the temperature of each segment and the dtype rules of the
    training forward, whose errors pass through.
    """

    @property
    def is_collective(self) -> bool:
        """Whether all ranks must call ``score`` together, because each holds a shard."""
        ...

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[FloatArray]]:
        """Log-probs in nats: for each trajectory, one ``[n]`` array a segment, in order."""
        ...


@dataclass(frozen=True)
class RecomputeReport:
    """Numbers of segments and tokens that one recomputation scored."""

    num_segments: int = 0
    num_tokens: int = 0


class ProximalRecomputer:
    """Fills the proximal slots of the segments of version c - 1, each once.

    All members of every group in flight that is not in training count: running, waiting for a
    reward or for siblings, queued, cached. Groups that the next commit will purge do not. With
    ``max_head_lag <= 1`` no token ever needs the score, and nothing is done.
    """

    def __init__(self, *, max_head_lag: int, mask_overdue: bool = False) -> None:
        self._max_head_lag, self._mask_overdue = max_head_lag, mask_overdue

    def run(self, registry: GroupRegistry, scorer: LogprobScorer, version: int) -> RecomputeReport:
        """Score under ``version``, which the scorer must hold."""
        if self._max_head_lag <= 1 or version < 1:
            return RecomputeReport()
        open_parts = self._find(registry, version)
        if not open_parts and not scorer.is_collective:
            return RecomputeReport()
        trajectories = [Trajectory(parts) for parts in open_parts]
        scores = scorer.score(trajectories)
        if len(scores) != len(trajectories):
            raise RolloutError(
                f"the scorer got {len(trajectories)} trajectories and returned {len(scores)}."
            )
        wanted = {  # trajectories may share a segment
            id(segment): (segment, _checked(logprobs, segment))
            for trajectory, rows in zip(trajectories, scores, strict=True)
            for segment, logprobs in zip(trajectory.segments, rows, strict=True)
            if _is_wanted(segment, version)
        }
        for segment, logprobs in wanted.values():
            segment.proximal.set(logprobs, version)
        return RecomputeReport(len(wanted), sum(len(segment) for segment, _ in wanted.values()))

    def _find(self, registry: GroupRegistry, version: int) -> list[tuple[Context | Segment, ...]]:
        open_parts: list[tuple[Context | Segment, ...]] = []
        for group in registry.snapshot():
            versions = group.versions
            if group.in_training or versions is None:
                continue
            if not versions[0] <= version - 1 <= versions[1]:
                continue  # nothing of it is wanted
            if not self._mask_overdue and version + 1 - versions[0] > self._max_head_lag:
                continue  # the next commit purges it
            for parts in group.parts:
                wanted = [i for i, p in enumerate(parts) if _is_wanted(p, version)]
                if wanted:
                    open_parts.append(parts[: wanted[-1] + 1])
        return open_parts


def _is_wanted(part: Context | Segment, version: int) -> bool:
    return isinstance(part, Segment) and part.version == version - 1 and not part.proximal.is_set


def _checked(logprobs: FloatArray, segment: Segment) -> FloatArray:
    if logprobs.shape != segment.logprobs.shape or not np.isfinite(logprobs).all():
        raise RolloutError(
            f"the scorer returned {logprobs!r} for a segment of {len(segment)} tokens: one finite "
            "log-prob a token is needed."
        )
    return logprobs
