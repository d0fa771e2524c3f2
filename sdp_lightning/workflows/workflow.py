"""The base class of workflows, and the session that a workflow works in."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from sdp_lightning.rewards.pool import RewardRejected
from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import Event

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that workflows use."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a completion."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text to tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Tokens to text."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = ...,
        tokenize: bool = ...,
    ) -> str:
        """A conversation to the text that the model expects."""
        ...


class RolloutSession:
    """The tokenizer and the episodes of one group.

    Args:
        tokenizer: tokenizer of the policy.
        new_episode: makes the episode of the n-th sample.
        saved: logs of the episodes of an interrupted run, which its new episodes restore.
        is_evaluation: whether the group is only judged, and never trained on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        new_episode: Callable[[int], Episode],
        saved: Sequence[Sequence[Event]] = (),
        *,
        is_evaluation: bool = False,
    ) -> None:
        self.tokenizer, self.is_evaluation = tokenizer, is_evaluation
        self.rejection = ""
        self._new_episode = new_episode
        self._saved = tuple(tuple(log) for log in saved)
        self._lock = threading.Lock()
        self._episodes: list[Episode] = []
        self._divergence = ""

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Episodes opened so far."""
        with self._lock:
            return tuple(self._episodes)

    @property
    def logs(self) -> list[tuple[Event, ...]]:
        """Log of every episode, those included that are still to be opened again."""
        episodes = self.episodes
        return [*(episode.log for episode in episodes), *self._saved[len(episodes) :]]

    @property
    def divergence(self) -> str:
        """How the workflow diverged from its interrupted run; empty if it did not."""
        return next((e.divergence for e in self.episodes if e.divergence), self._divergence)

    def open(self) -> Episode:
        """A new episode; the n-th one of a group always gets the same random numbers."""
        with self._lock:
            index = len(self._episodes)
            episode = self._new_episode(index)
            if index < len(self._saved):
                episode.restore(self._saved[index])
            self._episodes.append(episode)
            return episode

    def reject(self, reason: str) -> None:
        """Reject this group. Groups are counted by ``reason``, which is one of a few texts."""
        self.rejection = reason

    def end(self) -> None:
        """Close the session when the workflow has returned: by then it must have restored all."""
        episodes = self.episodes
        if len(episodes) < len(self._saved) or any(e.is_restoring for e in episodes):
            self._divergence = "it ended before it had repeated all saved steps"


class RolloutWorkflow(ABC):
    """Turns one dataset row into the trajectories of one group.

    Holds settings only: the same object serves many groups at once.

    After a resume it runs again for an interrupted group and is given the tokens sampled before. So
    it should do the same things in the same order, given the same row and tokens. If it does not,
    the saved tokens of that group are discarded, and it is sampled from scratch.
    """

    @property
    @abstractmethod
    def sampling(self) -> SamplingParams:
        """Sampling settings; the trainer scores at the same temperature."""

    @abstractmethod
    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        """Roll out ``row``.

        Returns:
            Trajectories of the group; None or an empty sequence rejects the row.

        Raises:
            Exception: any; the group is counted as failed, others go on.
        """

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts over a run, logged by their names, which are the same on every rank."""
        return {}

    def close(self) -> None:  # noqa: B027 # most hold nothing
        """Release processes at the end of a run. The next run may start them again."""


def why_rejected(trajectories: Sequence[Trajectory] | None) -> str:
    """Reason why the return value of a workflow cannot be trained on; empty if it can."""
    if trajectories is None:
        return "the workflow returned None"
    if len(trajectories) == 0:
        return "the workflow returned no trajectories"
    if any(trajectory.head_version is None for trajectory in trajectories):
        return "a trajectory has no sampled tokens"
    return ""


async def gather_or_reject(
    session: RolloutSession, samples: Sequence[Coroutine[Any, Any, Trajectory]]
) -> list[Trajectory] | None:
    """The trajectories of all samples; None, with the group rejected, if a reward is missing.

    If a sample fails, the others are cancelled before its error goes on.
    """
    try:
        return await gather_or_cancel(samples)
    except RewardRejected as error:
        logger.warning("%s; its group is rejected", error)
        session.reject("a reward could not be had")
        return None


async def gather_or_cancel(
    samples: Sequence[Coroutine[Any, Any, Trajectory]],
) -> list[Trajectory]:
    """Await all samples; if one fails, the others are cancelled before its error goes on."""
    tasks = [asyncio.ensure_future(sample) for sample in samples]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
