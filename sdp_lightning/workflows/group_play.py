"""The samples of one group, played side by side; those that infrastructure errors cost it.

A sample that raises ``InfrastructureError`` is left out: it is in neither mean nor standard
deviation of its group, as it is not in the group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sdp_lightning.errors import InfrastructureError
from sdp_lightning.rewards.pool import RewardRejected
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import DivergenceError
from sdp_lightning.workflows.workflow import RolloutSession, gather_or_cancel

logger = logging.getLogger(__name__)

INFRASTRUCTURE = "infrastructure errors left too few samples"  # reason of a rejection
Sample = TypeVar("Sample")
Play = Callable[[Episode], Coroutine[Any, Any, Sample]]


async def play_group(session: RolloutSession, size: int, play: Play[Sample]) -> list[Sample] | None:
    """The samples of a group of ``size``; None if it is rejected.

    If fewer than ``session.min_group_size`` are left, those that were lost are played again with
    the tokens that they had, up to ``session.lost_retries`` times; if there are still too few, the
    group is rejected. If a sample fails otherwise, the others are cancelled before its error goes
    on.

    Args:
        session: opens the episodes, and counts the errors.
        size: number of samples.
        play: makes the sample of an episode, as a trajectory.
    """
    try:
        samples = await _play_all(session, size, play)
    except RewardRejected as error:
        _reject(session, error)
        return None
    left = [sample for sample in samples if sample is not None]
    session.num_left_out = size - len(left)
    for index, sample in enumerate(samples):
        if sample is None:
            session.reopen(index, keep=False)  # it has no steps that it must still repeat
    if len(left) < min(session.min_group_size, size):
        session.reject(INFRASTRUCTURE)
        return None
    return left


async def score_together(
    session: RolloutSession, size: int, score: Callable[[], Coroutine[Any, Any, list[Sample]]]
) -> list[Sample] | None:
    """The scores of a group that are computed at once; None if it is rejected.

    After an infrastructure error, ``score`` is called again up to ``session.lost_retries`` times.
    """
    try:
        for _ in range(1 + session.lost_retries):
            try:
                return await score()
            except InfrastructureError as error:
                session.add_error(error.cause)
    except RewardRejected as error:
        _reject(session, error)
        return None
    session.num_left_out += size
    session.reject(INFRASTRUCTURE)
    return None


def _reject(session: RolloutSession, error: RewardRejected) -> None:
    logger.warning("%s; its group is rejected", error)
    session.reject("a reward could not be had")


async def _play_all(session: RolloutSession, size: int, play: Play[Sample]) -> list[Sample | None]:
    """The samples, None for those that are lost."""
    episodes = [session.open() for _ in range(size)]
    samples = await gather_or_cancel([_sample(session, play, episode) for episode in episodes])
    for _ in range(session.lost_retries):
        lost = [index for index, sample in enumerate(samples) if sample is None]
        if size - len(lost) >= min(session.min_group_size, size):
            break
        again = await gather_or_cancel([_sample_again(session, play, index) for index in lost])
        for index, sample in zip(lost, again, strict=True):
            samples[index] = sample
    return samples


async def _sample(session: RolloutSession, play: Play[Sample], episode: Episode) -> Sample | None:
    try:
        return await play(episode)
    except InfrastructureError as error:
        session.add_error(error.cause)
        return None


async def _sample_again(session: RolloutSession, play: Play[Sample], index: int) -> Sample | None:
    try:
        return await _sample(session, play, session.reopen(index))
    except DivergenceError:  # an environment that answers otherwise: it begins anew
        return await _sample(session, play, session.reopen(index, keep=False))
