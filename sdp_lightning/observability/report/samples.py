"""Sampled trajectories of a run: best, worst, most mixed, random. Bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from reprlib import Repr
from typing import Any

from sdp_lightning.observability.view.text import LONGEST, visible
from sdp_lightning.types import Row, Trajectory, TrajectoryGroup

NUM_EXTREME, NUM_RANDOM = 3, 6
MOST_FIELDS = 12  # of a row on the page


@dataclass(eq=False)
class Sample:
    """One sampled trajectory.

    Args:
        trajectory: the trajectory that was trained on.
        row_id: id of the prompt's row, as it is shown.
        version: policy version of the trainer then.
        mean_reward: mean reward of its group.
        row: the prompt's row.
        drawn: HTML, once it is drawn.
        fields: fields of the row as short texts, once it is drawn.
    """

    trajectory: Trajectory
    row_id: str
    version: int
    mean_reward: float
    row: Row = field(default_factory=dict[str, Any])
    drawn: str | None = None
    fields: dict[str, str] | None = None

    def state(self, draw: Callable[[Sample], str]) -> dict[str, Any]:
        """Facts and HTML for a page; ``draw`` makes the HTML, once."""
        if self.drawn is None:
            self.drawn, self.fields = draw(self), row_fields(self.row)
            self.row = {}
        return {
            "row_id": self.row_id,
            "version": self.version,
            "reward": self.trajectory.reward,
            "mean_reward": self.mean_reward,
            "rewards": dict(self.trajectory.rewards),
            "row": self.fields,
            "html": self.drawn,
        }


class SampleKeeper:
    """Keeps the ``NUM_EXTREME`` best, worst, and those that most versions sampled.

    Of equal ones the newer is kept, and at most one of a batch. Beside them ``NUM_RANDOM`` random
    ones: every batch has the same chance, early or late.
    """

    def __init__(self, seed: int = 0) -> None:
        self.best: list[Sample] = []
        self.worst: list[Sample] = []
        self.mixed: list[Sample] = []
        self.random: list[Sample] = []
        self._generator = random.Random(seed)
        self._num_batches = 0

    def see(
        self,
        groups: Sequence[TrajectoryGroup],
        version: int,
        rows: Mapping[int, Row] | None = None,
    ) -> None:
        """Consider the groups of one batch, trained at ``version``; ``rows`` by their ``order``."""
        members = [(group, trajectory) for group in groups for trajectory in group.trajectories]
        if not members:
            return
        self._generator.shuffle(members)

        def sample(chosen: tuple[TrajectoryGroup, Trajectory]) -> Sample:
            group, trajectory = chosen
            row = (rows or {}).get(group.order, {})
            return Sample(trajectory, visible(group.row_id), version, group.reward, row)

        rewards = [trajectory.reward for _, trajectory in members]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        mixed = max(members, key=lambda member: _num_versions(member[1]))
        self.best = _first([sample(members[best]), *self.best], lambda s: -s.trajectory.reward)
        self.worst = _first([sample(members[worst]), *self.worst], lambda s: s.trajectory.reward)
        if _num_versions(mixed[1]) > 1:
            kept = [sample(mixed), *self.mixed]
            self.mixed = _first(kept, lambda s: -_num_versions(s.trajectory))
        self._num_batches += 1
        slot = self._generator.randrange(self._num_batches)
        if len(self.random) < NUM_RANDOM:
            self.random.append(sample(members[0]))
        elif slot < NUM_RANDOM:
            self.random[slot] = sample(members[0])

    def state(self, draw: Callable[[Sample], str]) -> dict[str, list[dict[str, Any]]]:
        """All samples by kind, for a page."""
        newest = sorted(self.random, key=lambda s: -s.version)
        kinds = {"best": self.best, "worst": self.worst, "mixed": self.mixed, "random": newest}
        return {kind: [sample.state(draw) for sample in kept] for kind, kept in kinds.items()}


def row_fields(row: Row) -> dict[str, str]:
    """Fields of a row as short texts, in their order; of more than ``MOST_FIELDS`` a count.

    >>> row_fields({"answer": "012359", "digits": [3, 1]})
    {'answer': '012359', 'digits': '[3, 1]'}
    """
    fields = {
        visible(str(name)): visible(item if isinstance(item, str) else _SHORT.repr(item))
        for name, item in islice(row.items(), MOST_FIELDS)
    }
    rest = len(row) - len(fields)
    return fields | {"": f"and {rest} more fields"} if rest > 0 else fields


_SHORT = Repr()  # looks at no more of a value than it shows
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = LONGEST // 2, LONGEST, LONGEST


def _num_versions(trajectory: Trajectory) -> int:
    return len({segment.version for segment in trajectory.segments})


def _first(samples: list[Sample], key: Callable[[Sample], float]) -> list[Sample]:
    return sorted(samples, key=key)[:NUM_EXTREME]
