"""What a workflow is, and what it gets to work with."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sdp_lightning.types import SamplingParams, Trajectory
from sdp_lightning.workflows.episode import Episode

Row = Mapping[str, Any]


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
    """

    def __init__(self, tokenizer: Tokenizer, new_episode: Callable[[int], Episode]) -> None:
        self.tokenizer = tokenizer
        self._new_episode = new_episode
        self._lock = threading.Lock()
        self._episodes: list[Episode] = []

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Those opened so far."""
        with self._lock:
            return tuple(self._episodes)

    def open(self) -> Episode:
        """A new episode; the n-th one of a group always gets the same random numbers."""
        with self._lock:
            episode = self._new_episode(len(self._episodes))
            self._episodes.append(episode)
            return episode


class RolloutWorkflow(ABC):
    """Turns one dataset row into the trajectories of one group.

    Holds settings only: the same object serves many groups at once.
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


def why_rejected(trajectories: Sequence[Trajectory] | None) -> str:
    """Why there is nothing to train on in what a workflow returned; empty if there is."""
    if trajectories is None:
        return "the workflow returned None"
    if len(trajectories) == 0:
        return "the workflow returned no trajectories"
    if any(trajectory.head_version is None for trajectory in trajectories):
        return "a trajectory has no sampled tokens"
    return ""
