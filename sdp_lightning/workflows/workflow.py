"""What a workflow is, and what it gets to work with."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sdp_lightning.types import Row, SamplingParams, Trajectory
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.episode_log import Event


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
    """What one group gets: a tokenizer, and episodes to write to.

    Args:
        tokenizer: of the policy.
        new_episode: makes the episode of the n-th sample.
        saved: logs of the episodes of an interrupted run, which those of this one replay.
        is_evaluation: the group is only judged, and never trained on.
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
        """Those opened so far."""
        with self._lock:
            return tuple(self._episodes)

    @property
    def logs(self) -> list[tuple[Event, ...]]:
        """Of every episode, also of those that are still to be opened again."""
        episodes = self.episodes
        return [*(episode.log for episode in episodes), *self._saved[len(episodes) :]]

    @property
    def divergence(self) -> str:
        """What was done otherwise than in the run that is replayed; empty if nothing."""
        return next((e.divergence for e in self.episodes if e.divergence), self._divergence)

    def open(self) -> Episode:
        """A new episode; the n-th one of a group always gets the same random numbers."""
        with self._lock:
            index = len(self._episodes)
            episode = self._new_episode(index)
            if index < len(self._saved):
                episode.replay(self._saved[index])
            self._episodes.append(episode)
            return episode

    def reject(self, reason: str) -> None:
        """Train on nothing of this group. Groups are counted by ``reason``: one of a few texts."""
        self.rejection = reason

    def end(self) -> None:
        """The workflow has returned. If it has not repeated all that was saved, that diverges."""
        episodes = self.episodes
        if len(episodes) < len(self._saved) or any(e.is_replaying for e in episodes):
            self._divergence = "it ended before it had repeated all that was saved"


class RolloutWorkflow(ABC):
    """Turns one dataset row into the trajectories of one group.

    Holds settings only: the same object serves many groups at once.

    After a resume it is run again for a group that was under way, and what it had sampled is given
    to it again. So it should do the same things in the same order, given the same row and tokens.
    If it does not, that group's saved tokens are discarded, and it is sampled from scratch.
    """

    @property
    @abstractmethod
    def sampling(self) -> SamplingParams:
        """How it samples; the trainer scores at the same temperature."""

    @abstractmethod
    async def run(self, row: Row, session: RolloutSession) -> Sequence[Trajectory] | None:
        """Roll out ``row``.

        Returns:
            The group's trajectories, or None (or nothing) to reject the row.

        Raises:
            Exception: any; the group is counted failed, others go on.
        """

    @property
    def counts(self) -> Mapping[str, int]:
        """What it counts over a run, under the same names on every rank; logged by them."""
        return {}

    def close(self) -> None:  # noqa: B027 # most hold nothing
        """A run has ended: let go of processes. The next run may start them again."""


def why_rejected(trajectories: Sequence[Trajectory] | None) -> str:
    """Why there is nothing to train on in what a workflow returned; empty if there is."""
    if trajectories is None:
        return "the workflow returned None"
    if len(trajectories) == 0:
        return "the workflow returned no trajectories"
    if any(trajectory.head_version is None for trajectory in trajectories):
        return "a trajectory has no sampled tokens"
    return ""


REWARD_REJECTED = "a reward could not be had"


async def gather_or_cancel(samples: Sequence[Any]) -> list[Trajectory]:
    """Await all; if one fails, the others are cancelled before its error goes on."""
    tasks = [asyncio.ensure_future(sample) for sample in samples]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
